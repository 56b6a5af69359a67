"""The model once more in NumPy, float64, written for clarity: what the JAX model must equal."""

import numpy as np


def forward(config, params, tokens, segment_ids=None):
    """Logits [B, T, V] of token ids [B, T]; one Python loop per visit, head and position."""
    p = {"/".join(k): np.asarray(v, np.float64) for k, v in _flatten(params)}
    batch = []
    for b, row in enumerate(np.asarray(tokens)):
        x = p["embedding"][row]
        first_kv = {}
        for block in config.visit_order:
            w = {k.removeprefix("blocks/"): v[block] for k, v in p.items() if "blocks/" in k}
            normed = _norm(x, w["attention_norm/scale"], config.norm_eps)
            keys_values = (
                _rotate(np.einsum("td,dkh->tkh", normed, w["attention/key"]), config.rope_theta),
                np.einsum("td,dkh->tkh", normed, w["attention/value"]),
            )
            if config.shared_kv == "first_visit":
                keys_values = first_kv.setdefault(block, keys_values)
            query = np.einsum("td,dnh->tnh", normed, w["attention/query"])
            query = _rotate(query, config.rope_theta)
            segments = None if segment_ids is None else np.asarray(segment_ids)[b]
            attended = _attend(query, *keys_values, segments)
            x = x + np.einsum("tnh,nhd->td", attended, w["attention/output"])
            x = x + _ffn(_norm(x, w["ffn_norm/scale"], config.norm_eps), w, config.ffn)
        x = _norm(x, p["final_norm/scale"], config.norm_eps)
        head = p["embedding"].T if config.tie_embeddings else p["head"]
        batch.append(x @ head)
    return np.stack(batch)


def _flatten(tree, prefix=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _rotate(x_TNH, theta):
    out = np.empty_like(x_TNH)
    half = x_TNH.shape[-1] // 2
    for t in range(x_TNH.shape[0]):
        for i in range(half):
            angle = t * theta ** (-i / half)
            a, b = x_TNH[t, :, i], x_TNH[t, :, i + half]
            out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, :, i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


def _attend(q_TNH, k_TKH, v_TKH, segments):
    out = np.zeros_like(q_TNH)
    group = q_TNH.shape[1] // k_TKH.shape[1]
    for t in range(q_TNH.shape[0]):
        visible = [s for s in range(t + 1) if segments is None or segments[s] == segments[t]]
        for n in range(q_TNH.shape[1]):
            scores = k_TKH[visible, n // group] @ q_TNH[t, n] / np.sqrt(q_TNH.shape[-1])
            weights = np.exp(scores - scores.max())
            out[t, n] = weights / weights.sum() @ v_TKH[visible, n // group]
    return out


def _ffn(x, w, kind):
    up = x @ w["ffn/up"]
    if kind == "relu":
        return np.maximum(up, 0) @ w["ffn/down"]
    gate = x @ w["ffn/gate"]
    return (gate / (1 + np.exp(-gate)) * up) @ w["ffn/down"]
