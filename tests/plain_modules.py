"""torch modules with any names and tensors, for tests that must not import more than torch."""

from torch import nn


def module_of(tensors):
    """A module with these parameters, which it shares; names are dotted."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        owner = root
        for step in path:
            if not hasattr(owner, step):
                owner.add_module(step, nn.Module())
            owner = getattr(owner, step)
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def fused_of(tensors):
    """The same tensors as transformers' module holds them."""
    fused = {}
    for name, tensor in tensors.items():
        if name.endswith("gate_and_up_projs"):
            fused[name.replace("gate_and_up_projs", "gate_up_proj")] = tensor.transpose(1, 2).contiguous()
        elif name.endswith("down_projs"):
            fused[name.replace("down_projs", "down_proj")] = tensor.transpose(1, 2).contiguous()
        else:
            fused[name.replace("gate.e_score", "e_score")] = tensor
    return fused
