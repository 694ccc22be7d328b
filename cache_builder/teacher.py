"""Who the teacher is: its folder, its tokenizer, and the digests by which a cache remembers both.

Nothing here reads weights into memory; that is left to the engine, and only when a shard is missing.
"""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage_specs.document import canonical_json
from storage_specs.errors import ConfigError, TokenizerError
from storage_specs.rendering import chat_template_digest
from storage_specs.vocabulary import special_roles, tokenizer_digest

DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")  # the first that matches
OTHER_FORMATS = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.pt", "*.pth", "original/*", "onnx/*"]


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher on this machine, unloaded.

    folder: local Hugging Face folder. dtype: the name of a torch dtype, resolved. max_positions: the model's own limit
    in tokens, or None. vocab_size: width of its logits. chat_template: what chats are rendered with, or None.

    Behind an endpoint there is no digest of weights or config, and folder and tokenizer only where one was named.
    """

    name: str
    revision: str | None
    folder: Path | None
    dtype: str
    max_positions: int | None
    vocab_size: int
    weights_digest: str | None
    config_digest: str | None
    tokenizer: Any
    chat_template: str | None

    def identity(self) -> dict[str, Any]:
        """What the manifest says of the teacher. No paths: the same weights are the same teacher on every machine."""
        return {
            "name": self.name,
            "revision": self.revision,
            "weights_digest": self.weights_digest,
            "config_digest": self.config_digest,
            "dtype": self.dtype,
        }

    def tokenizer_identity(self) -> dict[str, Any]:
        return {"digest": None if self.tokenizer is None else tokenizer_digest(self.tokenizer)}

    def chat_template_identity(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"digest": chat_template_digest(self.chat_template), "kwargs": kwargs}

    def end_ids(self) -> tuple[int, ...]:
        """The tokens with which this teacher ends a text or a turn: its generation config's and its tokenizer's."""
        if self.tokenizer is None:
            return ()
        ends = {token for token, role in special_roles(self.tokenizer).items() if role in ("eos", "end_of_turn")}
        if getattr(self.tokenizer, "eos_token_id", None) is not None:
            ends.add(self.tokenizer.eos_token_id)
        named = None
        with suppress(OSError, ValueError, AttributeError, TypeError):  # none, or unreadable: the tokenizer's will do
            named = json.loads((self.folder / "generation_config.json").read_bytes()).get("eos_token_id")
        ends |= set(named if isinstance(named, list) else [] if named is None else [named])
        return tuple(sorted(token for token in ends if token < self.vocab_size))


def find_teacher(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    tokenizer: str | None = None,
    chat_template_file: str | None = None,
    weightless: bool = False,
) -> Teacher:
    """Resolve a local folder or a hub name (downloaded on first use) and take its digests.

    dtype `auto` is the model's own. chat_template_file replaces the tokenizer's template. weightless: the folder may
    lack weights (vLLM's dummy ones). Raises ConfigError, TokenizerError.
    """
    import transformers

    folder, revision = _local_folder(name, revision)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"teacher {name}: no Hugging Face model folder: {error}") from error
    text_config = config.get_text_config()
    tokenizer_object = _tokenizer(_local_folder(tokenizer, None)[0] if tokenizer else folder)
    return Teacher(
        name=folder.resolve().name if Path(name).is_dir() else name,
        revision=revision,
        folder=folder,
        dtype=_dtype(dtype, config),
        max_positions=getattr(text_config, "max_position_embeddings", None),
        vocab_size=text_config.vocab_size,
        weights_digest=None if weightless else weights_digest(folder),
        config_digest=hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        tokenizer=tokenizer_object,
        chat_template=_template(chat_template_file, tokenizer_object),
    )


def endpoint_teacher(
    name: str,
    *,
    revision: str | None,
    tokenizer: str | None,
    chat_template_file: str | None,
    vocab_size: int | None,
    needs_tokenizer: bool,
) -> Teacher:
    """A teacher behind an endpoint, which knows it as `name`.

    tokenizer: a folder or hub name; without one the endpoint tokenises, and `vocab_size` has to be given. Raises
    ConfigError, TokenizerError.
    """
    if tokenizer is None:
        if needs_tokenizer:
            raise ConfigError("engine server sends token ids in mode score and where k_ids > 0: name its --tokenizer")
        if vocab_size is None:
            raise ConfigError("an endpoint does not say how many words its vocabulary has: give --vocab_size")
        if chat_template_file is not None:
            raise ConfigError("--chat_template needs --tokenizer: without one the endpoint renders chats itself")
    folder = None if tokenizer is None else _local_folder(tokenizer, None)[0]
    loaded = None if folder is None else _tokenizer(folder)
    return Teacher(
        name=name,
        revision=revision,
        folder=folder,
        dtype="unknown",
        max_positions=None,
        vocab_size=vocab_size or len(loaded),
        weights_digest=None,
        config_digest=None,
        tokenizer=loaded,
        chat_template=None if loaded is None else _template(chat_template_file, loaded),
    )


def weights_digest(folder: Path) -> str:
    """sha256 over the weight files' names and sha256, sorted by name. Raises ConfigError if there are none."""
    files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)), [])
    if not files:
        raise ConfigError(f"teacher {folder}: no weight files ({' or '.join(WEIGHT_PATTERNS)}) in this folder")
    return hashlib.sha256(canonical_json([[file.name, _file_digest(file)] for file in files])).hexdigest()


def _file_digest(file: Path) -> str:
    """sha256 of a file; the hub's download cache already keeps large files under that name."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _local_folder(name: str, revision: str | None) -> tuple[Path, str | None]:
    """A folder as it is (revision must be None), or a hub name's snapshot and its commit."""
    if Path(name).is_dir():
        if revision:
            raise ConfigError(f"{name} is a local folder and has no revision {revision!r}; leave --revision out")
        return Path(name), None
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ConfigError(f"teacher {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=[*OTHER_FORMATS, WEIGHT_PATTERNS[1]]))
        if not list(folder.glob(WEIGHT_PATTERNS[0])):
            folder = Path(snapshot_download(name, revision=revision, ignore_patterns=OTHER_FORMATS))
    except Exception as error:  # names, network, permissions: huggingface_hub has a class for each
        raise ConfigError(
            f"teacher {name}: no such folder, and the hub does not give it ({type(error).__name__}: {error})"
        ) from error
    return folder, folder.name


def _dtype(dtype: str, config: Any) -> str:
    """The model's own dtype is in its config; configs that state none are float32."""
    if dtype == "auto":
        own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        return str(own or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, but must be auto, {', '.join(DTYPES)}")
    return dtype


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise TokenizerError(
            f"tokenizer {folder}: cannot be loaded ({error}); name another with --tokenizer"
        ) from error


def _template(file: str | None, tokenizer: Any) -> str | None:
    """The file's text, or the tokenizer's own template (of several named ones, `default`)."""
    if file is None:
        own = getattr(tokenizer, "chat_template", None)
        return own.get("default") if isinstance(own, dict) else own
    try:
        return Path(file).read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {file}: cannot be read: {error}") from None
