"""The losses as their definitions read: float64, one position at a time, full sorts. Benchmarks import them too."""

import math

import torch


def full_uld(student_logits_NV: torch.Tensor, teacher_probs_NU: torch.Tensor) -> torch.Tensor:
    """(N,) sum_i |p_(i) - q_(i)| over whole vocabularies, the smaller one zero-padded."""
    losses = []
    for logits_V, probs_U in zip(student_logits_NV.double(), teacher_probs_NU.double(), strict=True):
        q = logits_V.softmax(0).sort(descending=True).values
        p = probs_U.sort(descending=True).values
        size = max(len(p), len(q))
        p = torch.cat([p, p.new_zeros(size - len(p))])
        q = torch.cat([q, q.new_zeros(size - len(q))])
        losses.append((p - q).abs().sum())
    return torch.stack(losses)


def cached_uld(
    student_logits_NV: torch.Tensor, teacher_probs_NK: torch.Tensor, teacher_tail_N: torch.Tensor
) -> torch.Tensor:
    """(N,) head + |T - S|, by a full sort of the student's probabilities."""
    losses = []
    for logits_V, probs_K, tail in zip(student_logits_NV.double(), teacher_probs_NK, teacher_tail_N, strict=True):
        q = logits_V.softmax(0).sort(descending=True).values
        k = len(probs_K)
        head_q = torch.cat([q[:k], q.new_zeros(max(0, k - len(q)))])
        losses.append((probs_K.double() - head_q).abs().sum() + (tail.double() - q[k:].sum()).abs())
    return torch.stack(losses)


def merged_uld(
    student_logits: list[tuple[torch.Tensor, list[int]]], teacher: list[tuple[torch.Tensor, float, list[float]]]
) -> torch.Tensor:
    """(N,) chain rule over groups. Per group the student's (logits (S, V), ids of its first S - 1 tokens) and the
    teacher's (sorted probabilities (K,) of its last row, its tail, gold log-probabilities of the rows before)."""
    losses = []
    for (logits_SV, ids), (probs_K, tail, golds) in zip(student_logits, teacher, strict=True):
        q_SV = logits_SV.double().softmax(1)
        student_scale = q_SV.new_ones(())
        for position, token in enumerate(ids):
            student_scale = student_scale * q_SV[position, token].clamp(min=1e-8)
        teacher_scale = 1.0
        for gold in golds:
            teacher_scale *= max(math.exp(gold), 1e-8)
        q = student_scale * q_SV[-1].sort(descending=True).values
        k = len(probs_K)
        head_q = torch.cat([q[:k], q.new_zeros(max(0, k - len(q)))])
        loss = (teacher_scale * probs_K.double() - head_q).abs().sum()
        losses.append(loss + (teacher_scale * tail - q[k:].sum()).abs())
    return torch.stack(losses)


def mapped(student_logits_NV: torch.Tensor, teacher_probs_NK: torch.Tensor, words_NI: torch.Tensor) -> torch.Tensor:
    """(N,) the divergence on student words with a bucket for the rest, as a dictionary of words."""
    losses = []
    for logits_V, probs_K, words_I in zip(student_logits_NV.double(), teacher_probs_NK.double(), words_NI, strict=True):
        q = logits_V.softmax(0)
        mass: dict[int, torch.Tensor] = {}
        for rank, word in enumerate(words_I.tolist()):
            if word >= 0:
                mass[word] = mass.get(word, 0.0) + probs_K[rank]
        loss = q.new_zeros(())
        for word, p in mass.items():
            if p > 0:
                loss = loss + p * (p.log() - q[word].log())
        unmapped = 1 - sum(mass.values(), q.new_zeros(()))
        complement = 1 - sum((q[word] for word in mass), q.new_zeros(()))
        if unmapped > 1e-12:
            loss = loss + unmapped * (unmapped.log() - complement.clamp(min=1e-6).log())
        losses.append(loss)
    return torch.stack(losses)


def merged_rows(probs_SV: torch.Tensor, ids_S: list[int], groups: list[list[int]], strategy: str) -> torch.Tensor:
    """(G, V) one row per group of positions, TRL's two ways: `bayesian`, the last row times the probabilities of the
    ids at the earlier ones; `observed`, the first row times those at the later ones."""
    merged = []
    for group in groups:
        base, others = (group[-1], group[:-1]) if strategy == "bayesian" else (group[0], group[1:])
        row_V = probs_SV[base]
        for position in others:
            row_V = row_V * probs_SV[position, ids_S[position]].clamp(min=1e-8)
        merged.append(row_V)
    return torch.stack(merged)


def sorted_distance(student_NV: torch.Tensor, teacher_NU: torch.Tensor) -> torch.Tensor:
    """(N,) sum_i |p_(i) - q_(i)| of rows that need not sum to 1."""
    size = max(student_NV.shape[1], teacher_NU.shape[1])
    q_NV, p_NV = (
        torch.nn.functional.pad(x.sort(dim=1, descending=True).values, (0, size - x.shape[1]))
        for x in (student_NV, teacher_NU)
    )
    return (p_NV - q_NV).abs().sum(1)


def cdf_distance(student_NV: torch.Tensor, teacher_NU: torch.Tensor) -> torch.Tensor:
    """(N,) sum_i |P_i - Q_i| of the running sums P, Q of the sorted rows: what others mean by the same name."""
    size = max(student_NV.shape[1], teacher_NU.shape[1])
    q_NV, p_NV = (
        torch.nn.functional.pad(x.sort(dim=1, descending=True).values, (0, size - x.shape[1])).cumsum(1)
        for x in (student_NV, teacher_NU)
    )
    return (p_NV - q_NV).abs().sum(1)


def jsd(
    student_logits_NV: torch.Tensor, teacher_probs_NK: torch.Tensor, ids_NI: torch.Tensor, beta: float
) -> torch.Tensor:
    """(N,) generalised Jensen-Shannon divergence over the ids of a row and a bucket for all other words."""
    losses = []
    for logits_V, probs_K, ids_I in zip(student_logits_NV.double(), teacher_probs_NK.double(), ids_NI, strict=True):
        q_V = logits_V.softmax(0)
        sides = [(probs_K[rank], q_V[word]) for rank, word in enumerate(ids_I.tolist()) if word >= 0]
        p_left, q_left = 1 - sum(p for p, _ in sides), 1 - sum(q for _, q in sides)
        sides.append((p_left * (p_left > 1e-12), q_left.clamp(min=1e-6)))
        loss = q_V.new_zeros(())
        for p, q in sides:
            m = beta * p + (1 - beta) * q
            if p > 0:
                loss = loss + beta * p * (p / m).log()
            if q > 0:
                loss = loss + (1 - beta) * q * (q / m).log()
        losses.append(loss)
    return torch.stack(losses)


def hybrid_rest(
    student_logits_NV: torch.Tensor,
    teacher_probs_NK: torch.Tensor,
    teacher_tail_N: torch.Tensor,
    words_NI: torch.Tensor,
) -> torch.Tensor:
    """(N,) sorted L1 of what `hybrid` compares without words: what is left on both sides, and what is behind that."""
    losses = []
    rows = zip(student_logits_NV.double(), teacher_probs_NK.double(), teacher_tail_N.double(), words_NI, strict=True)
    for logits_V, probs_K, tail, words_I in rows:
        q_V, words = logits_V.softmax(0), words_I.tolist()
        p_left = [p for rank, p in enumerate(probs_K) if rank >= len(words) or words[rank] < 0]
        free_V = torch.ones(len(q_V), dtype=torch.bool)
        free_V[[word for word in words if word >= 0]] = False
        q_left = q_V[free_V].sort(descending=True).values
        loss = (tail - q_left[len(p_left) :].sum()).abs()
        for rank, p in enumerate(p_left):
            loss = loss + (p - q_left[rank] if rank < len(q_left) else p).abs()
        losses.append(loss)
    return torch.stack(losses)


def likelihood(
    student: list[list[torch.Tensor]], teacher: list[list[float]], temperature: float, lowered: float = 0.0
) -> torch.Tensor:
    """(G,) the divergence of two coins per chunk: log-probabilities of its tokens on both sides."""
    losses = []
    for own, theirs in zip(student, teacher, strict=True):
        b = torch.exp(sum(own) / temperature - lowered)
        a = torch.exp(torch.tensor(sum(theirs), dtype=torch.float64) / temperature - lowered)
        losses.append(a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())
    return torch.stack(losses)
