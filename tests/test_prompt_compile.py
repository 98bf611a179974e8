"""Prompts under torch.compile: whole graphs at the first call, and gradients as exact as eager ones.

Inductor (torch 2.11) overwrites what it keeps for the backward pass without looking whether two of these tensors share
memory, so a wrong gradient is a matter of widths and lengths. Hence two tests: some compiled gradients against
float64, and, over more widths and lengths, nothing that is kept overlaps.
"""

import itertools

import open_clip
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from fastprob.prompts import DAPT, CoCoOp, CoOp
from fastprob.prompts.attention import attention

NAMES = ["golden retriever", "cat", "fire engine red", "a b c d", "a b c d e", "a b c d e f"]  # of six lengths


def build(what, names, width=64, heads=2, layers=1, **options):
    """A method of what is to be compiled, as `step(dtype)` -> its loss; and its parameters. Token embeddings are large,
    so that a wrong gradient shows."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads, "layers": layers}
    model = open_clip.CLIP(48, vision, text).eval().requires_grad_(False)
    model.token_embedding.weight *= 20
    images, features, labels = torch.randn(3, 3, 32, 32), torch.randn(3, 48), torch.arange(3) % len(names)
    method = {"CoOp": CoOp, "CoCoOp": CoCoOp, "DAPT": DAPT}[what]
    method = method(model, open_clip.get_tokenizer("ViT-B-32"), names, context_length=4, init=None, **options)
    center = torch.randn(len(names), 48)

    def step(images, features, center):
        if what == "DAPT":
            return method.loss(images, labels, center)
        return F.cross_entropy(method(features), labels)

    def inputs(dtype=torch.float32):
        model.to(dtype)
        method.to(dtype)
        return images.to(dtype), features.to(dtype), center.to(dtype)

    return step, inputs, list(method.parameters())


@pytest.mark.parametrize(("what", "names"), [("CoOp", 2), ("CoCoOp", 2), ("DAPT", 3)])
def test_compiled_gradients_are_right(what, names):
    """Cold: the first call is the compiled one."""
    torch._dynamo.reset()
    step, inputs, parameters = build(what, NAMES[:names])

    def grads(step, dtype):
        return torch.autograd.grad(step(*inputs(dtype)), parameters)

    compiled = grads(torch.compile(step, fullgraph=True), torch.float32)
    eager, truth = grads(step, torch.float32), grads(step, torch.float64)
    for c, e, t in zip(compiled, eager, truth):
        assert (c - t).norm() <= 3 * (e - t).norm() + 1e-6 * t.norm()


def overlapping(step, inputs):
    """Names of tensors in one storage, kept for the backward pass, that overlap in memory."""
    found = []

    def look(graph, _):
        kept = {}
        for node in next(reversed(graph.graph.find_nodes(op="output"))).args[0]:
            value = node.meta["val"] if hasattr(node, "meta") else None
            if isinstance(value, torch.Tensor) and value.numel():
                end = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride()))
                span = value.storage_offset(), value.storage_offset() + end, node.name
                kept.setdefault(StorageWeakRef(value.untyped_storage()), []).append(span)
        for spans in kept.values():
            spans.sort()
            found.extend((one[2], two[2]) for one, two in itertools.pairwise(spans) if two[0] <= one[1])
        return make_boxed_func(graph.forward)

    options = {"partition_fn": min_cut_rematerialization_partition, "decompositions": select_decomp_table()}
    backend = aot_autograd(fw_compiler=look, bw_compiler=lambda graph, _: make_boxed_func(graph.forward), **options)
    torch.compile(step, fullgraph=True, backend=backend)(*inputs).backward()
    return found


@pytest.mark.parametrize(
    ("what", "names", "sizes"),
    [
        ("CoOp", 6, {"width": 96, "heads": 3, "layers": 2}),
        ("CoOp", 1, {"width": 512, "heads": 8}),
        ("CoOp", 3, {"path": "truncated"}),
        ("CoOp", 3, {"path": "plain"}),
        ("CoCoOp", 3, {"width": 96, "heads": 2, "layers": 2}),
        ("DAPT", 4, {"heads": 4, "layers": 2}),
    ],
)
def test_nothing_kept_for_the_backward_pass_overlaps(what, names, sizes):
    torch._dynamo.reset()
    step, inputs, _ = build(what, NAMES[:names], **sizes)
    assert not overlapping(step, inputs())


def test_the_operator_is_the_composition():
    """What torch.compile takes in place of it: values, gradients, shapes."""
    counts, lengths, prefix = (2, 3, 1), (2, 3, 5), 5
    operator = torch.ops.fastprob._prompt_attention.default
    for queries in (5 + 4 + 9 + 5, 6):  # of all tokens, of the last ones alone
        q = torch.randn(2, queries, 3, 4, dtype=torch.float64, requires_grad=True)
        kv = torch.randn(2, 23, 2, 3, 4, dtype=torch.float64, requires_grad=True)
        composed, grad = attention(q, kv, prefix, counts, lengths), torch.randn(2, queries, 3, 4, dtype=torch.float64)
        alone = operator(q, kv, prefix, counts, lengths)
        torch.testing.assert_close(alone, composed)
        grads = (torch.autograd.grad(value, (q, kv), grad) for value in (alone, composed))
        torch.testing.assert_close(*grads)
        torch.library.opcheck(operator, (q, kv, prefix, counts, lengths))
