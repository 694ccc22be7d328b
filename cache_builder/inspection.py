"""What is in a cache and what it costs, for people and (as JSON) for scripts; and what a build prints at its end."""

import os
from collections import Counter
from io import BytesIO
from typing import TYPE_CHECKING, Any

from storage_specs.reader import Cache, open_cache
from storage_specs.row_coding import id_columns
from storage_specs.shard_bytes import ObjectParts
from storage_specs.stored_object import StoredObject

if TYPE_CHECKING:
    from cache_builder.builder import BuildReport
    from storage_specs.document import CachedDocument


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """JSON-able facts from the manifest and from the sizes of the objects. Raises NotACacheError, CorruptCacheError."""
    cache = open_cache(path)
    manifest, columns = cache.manifest, column_bytes(cache)
    rows, ids = manifest.counts["rows"], id_columns(manifest.row_shape)
    return {
        "cache_id": manifest.cache_id,
        "store": manifest.store,
        "codec": manifest.codec,
        "k": manifest.k,
        "k_ids": manifest.k_ids,
        "vocab_size": manifest.vocab_size,
        "counts": manifest.counts,
        "held_out": manifest.held_out,
        "shards": len(cache.documents_per_shard),
        "bytes": sum(columns.values()),
        "bytes_per_row": sum(columns.values()) / rows if rows else None,
        "bytes_per_row_without_ids": sum(columns[name] for name in columns if name not in ids) / rows if rows else None,
        "bytes_by_column": columns,
        "teacher": manifest.teacher,
        "tokenizer": manifest.tokenizer,
        "chat_template": manifest.chat_template,
        "engine": manifest.engine,
        "windows": manifest.windows,
        "corpus": manifest.corpus,
        "text": manifest.text,
        "generation": manifest.generation,
        "drift": manifest.drift,
        "replaces": manifest.replaces,
        "config_digest": manifest.config_digest,
    }


def column_bytes(cache: Cache) -> dict[str, int]:
    """Stored bytes of every column over all shards; `other` is what belongs to none (headers, records, footers).

    Only sizes are looked at, and of Parquet shards the footers, which say what their columns cost. Raises
    CorruptCacheError's kinds.
    """
    sizes: Counter[str] = Counter()
    objects = cache.reader.objects
    there = dict(objects.list("shards/"))
    for shard in range(len(cache.documents_per_shard)):
        for stored in cache.table.objects[shard]:
            objects.check_size(stored, there)
            inside = stored.name.split("/")[1:]
            if stored.name.endswith(".parquet"):
                columns = _parquet_columns(cache, shard, stored)
                sizes.update(columns)
                sizes["other"] += stored.size - sum(columns.values())
            else:
                sizes[inside[1] if len(inside) > 2 else "other"] += stored.size
    return dict(sorted(sizes.items(), key=lambda item: (item[0] == "other", -item[1], item[0])))


def describe(facts: dict[str, Any]) -> str:
    """The facts as text, one topic per line."""
    counts, teacher, engine, codec = facts["counts"], facts["teacher"], facts["engine"], facts["codec"]
    rows = counts["rows"]
    lines = [
        f"cache      {facts['cache_id']}",
        f"documents  {counts['documents']:,} in {facts['shards']:,} shards of the {facts['store']} store, "
        f"{facts['held_out']['documents']:,} held out, {counts['empty_documents']:,} without rows",
        f"rows       {rows:,} ({counts['end_rows']:,} end rows); {counts['unscored_bytes']:,} of "
        f"{counts['text_bytes']:,} text bytes in scored spans have no row",
        f"values     top {facts['k']} of {facts['vocab_size']:,}, ids of the first {facts['k_ids']}; profile "
        f"{codec['profile']}",
        "L1 error   "
        + ", ".join(f"{name} {codec[f'{name}_l1_error']:.2e}" for name in ("mean", "p99", "max", "bound")),
        f"teacher    {teacher['name']}, {teacher['dtype']}, weights {teacher['weights_digest'] or 'none'}",
        f"tokenizer  {facts['tokenizer']['digest']}",
        f"template   {facts['chat_template']['digest'] if facts['chat_template'] else 'none'}",
        f"engine     {engine['name']} {engine['version']}, {engine['dtype']}, attention {engine['attention_backend']}, "
        f"windows of {facts['windows']['max_model_len']} tokens overlapping {facts['windows']['overlap']}",
        *_size_lines(facts),
    ]
    if facts["drift"] is not None:
        gold, probs = facts["drift"]["gold_logprob"], facts["drift"]["probs"]
        lines.append(
            f"drift      from {facts['drift']['reference']}: gold {gold['p50']:.1e} nats (p99 {gold['p99']:.1e}), "
            f"probabilities {probs['p50']:.1e} (p99 {probs['p99']:.1e})"
        )
    return "\n".join(lines) + "\n"


def _size_lines(facts: dict[str, Any]) -> list[str]:
    """What the cache costs, in all and by column."""
    rows, lines = facts["counts"]["rows"], [f"size       {facts['bytes']:,} bytes"]
    if rows:
        lines[0] += f", {facts['bytes_per_row']:.1f} per row; without ids {facts['bytes_per_row_without_ids']:.1f}"
    for name, size in facts["bytes_by_column"].items():
        lines.append(f"  {name:<14} {size:>14,}" + (f" {size / rows:>8.2f} per row" if rows else ""))
    return lines


def show_rows(path: str | os.PathLike[str], count: int) -> str:
    """The first rows of the first document that has any: what was expected, and what followed."""
    cache = open_cache(path)
    document = next((cache[number] for number in range(len(cache)) if len(cache[number].segment)), None)
    if document is None:
        return "no rows\n"
    words = cache.vocabulary.token_bytes if cache.vocabulary else None
    lines = [_row(document, row, words) for row in range(min(count, len(document.segment)))]
    return "\n".join(["", f"document {document.doc_id}", *lines]) + "\n"


def build_summary(report: "BuildReport", path: str | os.PathLike[str]) -> str:
    """What one call of `build` did and what the cache holds now."""
    work = report.work
    if report.shards_written:
        speed = f"; {work.tokens:,} tokens in {report.seconds:.1f} s, {work.tokens / report.seconds:,.0f} tok/s"
        did = f"wrote {report.shards_written:,} shards{speed}"
    elif report.manifest is not None:
        did = "already complete, nothing to do"
    else:
        did = "no shard of this range is missing, nothing to do"
    if work.cut_short or work.refused:
        did += (
            f"\n{work.cut_short:,} completions were cut by max_model_len, before max_tokens; {work.refused:,} were "
            "refused, because they are no UTF-8"
        )
    if report.manifest is None:
        return (
            f"{path}: {did}\n{report.shards_missing:,} shards of other ranges are missing; who writes the last ends it"
        )
    counts = report.manifest.counts
    return "\n".join(
        [
            f"{path}: {did}",
            f"{counts['documents']:,} documents ({counts['empty_documents']:,} without rows), {counts['rows']:,} rows, "
            f"{counts['unscored_bytes']:,} unscored bytes, {work.windows_cut:,} windows cut, "
            f"cache_id {report.manifest.cache_id}",
            *_size_lines(inspect(path)),
        ]
    )


def _parquet_columns(cache: Cache, shard: int, stored: StoredObject) -> dict[str, int]:
    """What the footer, a Parquet file's last part, says of its columns."""
    import pyarrow.parquet as pq

    parts = cache.reader.record(shard).parts
    source = ObjectParts(cache.reader.objects, [stored], parts)
    footer = source.read(stored.name, stored.size - parts[stored.name].sizes[-1] if stored.name in parts else 0)
    sizes: Counter[str] = Counter()
    metadata = pq.read_metadata(BytesIO(footer))
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            sizes[column.path_in_schema.partition(".")[0]] += column.total_compressed_size
    return dict(sizes)


def _row(document: "CachedDocument", row: int, words: list[bytes | None] | None) -> str:
    data = document.text.encode()
    place = f"{document.segment[row]}:{document.byte_start[row]}-{document.byte_end[row]}"
    followed = "end" if document.is_end[row] else repr(data[document.byte_start[row] : document.byte_end[row]])[1:]
    best = f"p1 {document.probs[row, 0]:.3f}"
    if words is not None and document.token_ids is not None:
        pairs = zip(document.token_ids[row, :4], document.probs[row], strict=False)
        best = ", ".join(f"{(words[token] or b'?')!r:.20} {prob:.3f}"[1:] for token, prob in pairs)
    gold, tail = document.gold_logprob[row], document.tail_mass[row]
    return f"  {place:<14} {followed:<16} {gold:8.3f} nats  tail {tail:.3f}  {best}"
