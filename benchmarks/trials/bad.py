"""The table of what can be wrong with a checkpoint."""

from __future__ import annotations

import numpy as np

from trials.damage import (
    INDEX,
    WEIGHTS,
    Damage,
    announced,
    bits,
    cast,
    config,
    copied,
    dropped,
    fifo,
    header,
    index,
    link,
    pickled,
    raw,
    renamed,
    tensors,
    truncated,
    turned,
    twice,
    whole,
)

LAYER = "model.layers.0."
QUERY, EMBED = LAYER + "self_attn.q_proj.weight", "model.embed_tokens.weight"
EXPERT = LAYER + "block_sparse_moe.experts."
W1, SCALE = EXPERT + "1.w1.weight", "_scale_inv"

REFUSED: dict[str, Damage] = {
    "header longer than the file": raw(b"{}", 10**6),
    "header of 100 MB and one byte": raw(b"{}", 100_000_001),
    "header of 2^64 - 1 bytes": raw(b"{}", 2**64 - 1),
    "header of no bytes": raw(b"", 0),
    "header nested 100,000 deep": raw(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a key twice": twice,
    "negative offset": header(lambda h: h[EMBED].update(data_offsets=[-8, h[EMBED]["data_offsets"][1]])),
    "overlapping tensors": header(lambda h: h[QUERY].update(data_offsets=[o - 8 for o in h[QUERY]["data_offsets"]])),
    "a gap between tensors": header(lambda h: h.pop(QUERY)),
    "a shape beyond 63 bits": header(lambda h: h[EMBED].update(shape=[2**40, 2**40])),
    "a dtype that does not fit its bytes": header(lambda h: h[EMBED].update(dtype="F32")),
    "an unknown dtype": header(lambda h: h[EMBED].update(dtype="F4")),
    "an incomplete download": truncated,
    "bytes behind the last tensor": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"\0"),
    "a Git LFS pointer": whole(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "an HTML page": whole(WEIGHTS, b"<!DOCTYPE html><html></html>"),
    "a weight_map with ../": index(lambda true: true | {QUERY: f"../hf/{WEIGHTS}"}),
    "a weight_map with an absolute path": index(lambda true: true | {QUERY: "/etc/passwd"}),
    "a weight_map with a file that is not there": index(lambda true: true | {QUERY: "lost.safetensors"}),
    "a weight_map that lists a tensor too many": index(lambda true: true | {"x": WEIGHTS}),
    "a weight_map that lists a tensor too few": index(lambda true: {k: v for k, v in true.items() if k != QUERY}),
    "a weight_map that is a list": index(list),
    "an index that is no JSON": whole(INDEX, b"{"),
    "an index nested 100,000 deep": whole(INDEX, b'{"weight_map":' * 100_000),
    "a link out of the folder": link("out"),
    "a link to a device": link("/dev/zero"),
    "a link to itself": link(WEIGHTS),
    "a FIFO in place of a file": fifo,
    "a pickle": pickled,
    "a missing scale": tensors(lambda t: t.pop(W1 + SCALE)),
    "all scales missing": tensors(lambda t: dropped(t, SCALE)),
    "a scale of no weight": tensors(
        lambda t: t.update({LAYER + "block_sparse_moe.gate.weight" + SCALE: t[W1 + SCALE]})
    ),
    "scales under two names": tensors(lambda t: t.update({QUERY.replace("weight", "scale"): t[QUERY + SCALE]})),
    "a grid of another shape": tensors(lambda t: t.update({QUERY + SCALE: ("F32", [3, 3], bytes(36))})),
    "scales in bf16": tensors(lambda t: cast(t, QUERY + SCALE, "BF16")),
    "a missing layer": tensors(lambda t: dropped(t, "layers.1.")),
    "a missing expert": tensors(lambda t: dropped(t, "layers.0.block_sparse_moe.experts.2.")),
    "an extra expert": tensors(lambda t: copied(t, "experts.2.", "experts.3.")),
    "a wrong name of experts": tensors(lambda t: renamed(t, ".w1.", ".gate_proj.")),
    "a layer past the config": tensors(lambda t: copied(t, "layers.1.", "layers.2.")),
    "MTP modules that config.json does not announce": tensors(lambda t: copied(t, "layers.1.", "mtp.layers.0.")),
    "mixed dtypes in one tensor": tensors(lambda t: cast(t, W1, "BF16")),
    "a transposed weight": tensors(lambda t: turned(t, QUERY)),
    "a transposed expert": tensors(lambda t: turned(t, W1)),
    "a norm of another size": tensors(lambda t: t.update({"model.norm.weight": ("BF16", [3], bytes(6))})),
    "integers for weights": tensors(lambda t: cast(t, EMBED, "I8")),
    "another model": tensors(lambda t: renamed(t, "block_sparse_moe", "mlp")),
    "both layouts mixed": tensors(
        lambda t: t.update({LAYER + "mlp.gate.weight": t[LAYER + "block_sparse_moe.gate.weight"]})
    ),
    "no tensors at all": tensors(lambda t: t.clear()),
    "config of another model": config(model_type="llama", architectures=["LlamaForCausalLM"]),
    "config without sizes": config(hidden_size=None),
    "config with a negative size": config(num_hidden_layers=-1),
    "config with 10^12 layers": config(num_hidden_layers=10**12),
    "config with an unknown attribute": config(sliding_window=4096),
    "config without block size": config(quantization_config=None),
    "config of another quantisation": config(quantization_config={"quant_method": "awq", "bits": 4}),
    "config that is no JSON": whole("config.json", b"{"),
    "config that is missing": lambda folder: (folder / "config.json").unlink(),
}
"""What has to be refused, by name."""

TOLD: dict[str, tuple[Damage, str]] = {
    "NaN codes": (bits(QUERY, np.uint8, 0x7F, 0xFF), "NaN"),
    "a NaN scale": (bits(QUERY + SCALE, np.uint32, 0x7FC00000), "NaN"),
    "an infinite scale": (bits(QUERY + SCALE, np.uint32, 0x7F800000), "infinity"),
    "a negative scale": (bits(QUERY + SCALE, np.uint32, 0xBF800000), "negative scale"),
    "a zero scale": (bits(QUERY + SCALE, np.uint32, 0), "zero scale"),
    "a subnormal scale": (bits(QUERY + SCALE, np.uint32, 1), "subnormal scale"),
    "NaN in a bf16 weight": (bits(EMBED, np.uint16, 0x7FC0), "NaN"),
}
"""What is carried along bit for bit and told by `verify`, with the word for it."""

LEFT_OUT: dict[str, Damage] = {
    "MTP modules that config.json announces": announced("mtp_layers.0."),
    "MTP modules that count on past the last layer": announced("layers.2."),
}
"""What is left out by name, and said."""
