"""ONNX: a MAR as a graph of operators that onnxruntime and others run.

    tokens int64 [batch, length]  ->  logits float32 [batch, length, vocab_size]

where the model has classes with a second input, labels int64 [batch]; num_classes is "no class".
Batch and length are free, up to the model's ``seq_len``.  One function below writes one layer of
`marref.layers`, with the same formula; constants have marref's dotted names, and the outputs of
the blocks those of their activations (``blocks.0.output``).  The operators are those of opset 17
(2022), so GELU, which has one from opset 20 on, is written out.

Needs the extra ``onnx``, which is why `marref.interop` does not import it by itself.
"""

import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from marref import trees
from marref.model import MAR, check_model
from marref.positions import sinusoidal_table
from marref.trees import Array, Tree

OPSET = 17
# The version of the file format that came with the opset.
_IR_VERSION = 8
# A protobuf message ends there, and the graph is one.
_MOST_BYTES = 2**31


class _Graph:
    """Nodes and constants in the order in which they are added; values go by their names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, array: Array) -> str:
        """Add a constant, once."""
        self.constants[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def number(self, value: float) -> str:
        return self.constant(f"number {value:.9g}", np.array(value, np.float32))

    def integers(self, *values: int) -> str:
        return self.constant(f"integers {values}", np.array(values, np.int64))

    def node(self, operator: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add an operator, and return the name of its output."""
        output = name or f"{operator} {len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output


def to_model(model: MAR, params: Tree, metadata: dict[str, str] | None = None) -> onnx.ModelProto:
    """Write a model as a graph.

    Parameters
    ----------
    model : MAR
        Dropout is left out: the graph is for inference.
    params : dict
        Rounded to float32.
    metadata : dict of str to str, optional
        Kept in the file.

    Returns
    -------
    onnx.ModelProto
        ``onnx.save`` writes it.

    Raises
    ------
    TypeError, ValueError
        The parameters do not fit the model, or are more than ONNX has room for in one file.
    """
    check_model(model)
    trees.check_like("params", params, model.parameter_shapes)
    params = trees.map_leaves(lambda leaf: leaf.astype(np.float32), params)
    size = sum(leaf.nbytes for leaf in trees.flatten(params).values())
    if size >= _MOST_BYTES:
        raise ValueError(f"params: {size:,} bytes, expected less than {_MOST_BYTES:,} in ONNX")
    graph = _Graph()
    x = _embedding(graph, model, params["embedding"])
    inputs = {"tokens": ["batch", "length"]}
    if model.num_classes is not None:
        x = _class_embedding(graph, params["class_embedding"], x)
        inputs["labels"] = ["batch"]
    for index, block_params in enumerate(params["blocks"]):
        x = _block(graph, f"blocks.{index}", model, block_params, x)
    x = _layer_norm(graph, "final_norm", model, params["final_norm"], x)
    _linear(graph, "head", params["head"], x, output="logits")
    taken = [
        helper.make_tensor_value_info(name, TensorProto.INT64, shape)
        for name, shape in inputs.items()
    ]
    logits = helper.make_tensor_value_info(
        "logits", TensorProto.FLOAT, ["batch", "length", model.vocab_size]
    )
    written = helper.make_model(
        helper.make_graph(graph.nodes, "MAR", taken, [logits], list(graph.constants.values())),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="marref",
    )
    helper.set_model_props(written, metadata or {})
    onnx.checker.check_model(written)
    return written


def _embedding(graph: _Graph, model: MAR, params: Tree) -> str:
    """x = table[tokens] + P, as far as the tokens reach."""
    table = graph.constant("embedding.table", params["table"])
    waves = sinusoidal_table(model.seq_len, model.embed_dim, model.positions)
    positions = graph.constant("positions", waves.astype(np.float32))
    vectors = graph.node("Gather", table, "tokens", axis=0)
    length = graph.node("Shape", "tokens", start=1, end=2)
    reached = graph.node("Slice", positions, graph.integers(0), length, graph.integers(0))
    return graph.node("Add", vectors, reached, name="embedding.output")


def _class_embedding(graph: _Graph, params: Tree, x: str) -> str:
    """y = x + table[labels], at every position."""
    table = graph.constant("class_embedding.table", params["table"])
    vectors = graph.node("Gather", table, "labels", axis=0)
    return graph.node("Add", x, graph.node("Unsqueeze", vectors, graph.integers(1)))


def _block(graph: _Graph, name: str, model: MAR, params: Tree, x: str) -> str:
    """h = x + attention(layer_norm(x)),  y = h + feed_forward(layer_norm(h))."""
    branch = _layer_norm(graph, f"{name}.attention_norm", model, params["attention_norm"], x)
    branch = _attention(graph, f"{name}.attention", model, params["attention"], branch)
    h = graph.node("Add", x, branch)
    branch = _layer_norm(graph, f"{name}.feed_forward_norm", model, params["feed_forward_norm"], h)
    branch = _feed_forward(graph, f"{name}.feed_forward", model, params["feed_forward"], branch)
    return graph.node("Add", h, branch, name=f"{name}.output")


def _attention(graph: _Graph, name: str, model: MAR, params: Tree, x: str) -> str:
    """softmax(Q Kᵀ/√d) V for every head, between the projections."""
    head_dim = model.embed_dim // model.num_heads
    # In a shape, 0 is the input's own length.
    apart = graph.integers(0, 0, model.num_heads, head_dim)

    def heads(part: str, perm: list[int]) -> str:
        projected = _linear(graph, f"{name}.{part}", params[part], x)
        return graph.node("Transpose", graph.node("Reshape", projected, apart), perm=perm)

    query = heads("query", [0, 2, 1, 3])  # [batch, heads, length, head_dim]
    transposed_key = heads("key", [0, 2, 3, 1])  # [batch, heads, head_dim, length]
    value = heads("value", [0, 2, 1, 3])
    scores = graph.node("MatMul", query, transposed_key)
    scores = graph.node("Div", scores, graph.number(math.sqrt(head_dim)))
    weights = graph.node("Softmax", scores, axis=-1)
    context = graph.node("Transpose", graph.node("MatMul", weights, value), perm=[0, 2, 1, 3])
    context = graph.node("Reshape", context, graph.integers(0, 0, model.embed_dim))
    return _linear(graph, f"{name}.output", params["output"], context)


def _feed_forward(graph: _Graph, name: str, model: MAR, params: Tree, x: str) -> str:
    """y = GELU(x W₁ + b₁) W₂ + b₂."""
    up = _linear(graph, f"{name}.up", params["up"], x)
    gelu = {"erf": _gelu_erf, "tanh": _gelu_tanh}[model.gelu]
    return _linear(graph, f"{name}.down", params["down"], gelu(graph, up))


def _gelu_erf(graph: _Graph, x: str) -> str:
    """y = x (1 + erf(x/√2)) / 2."""
    erf = graph.node("Erf", graph.node("Div", x, graph.number(math.sqrt(2.0))))
    gate = graph.node("Mul", graph.node("Add", erf, graph.number(1.0)), graph.number(0.5))
    return graph.node("Mul", x, gate)


def _gelu_tanh(graph: _Graph, x: str) -> str:
    """y = x σ(2u),  u = √(2/π) (x + 0.044715 x³)."""
    square = graph.node("Mul", x, x)
    cubic = graph.node("Mul", graph.number(0.044715), graph.node("Mul", square, x))
    twice = graph.number(2.0 * math.sqrt(2.0 / math.pi))
    gate = graph.node("Sigmoid", graph.node("Mul", twice, graph.node("Add", x, cubic)))
    return graph.node("Mul", x, gate)


def _layer_norm(graph: _Graph, name: str, model: MAR, params: Tree, x: str) -> str:
    """y = γ ⊙ (x - μ)/sqrt(σ² + ε) + β over the features."""
    scale = graph.constant(f"{name}.scale", params["scale"])
    bias = graph.constant(f"{name}.bias", params["bias"])
    epsilon = model.layer_norm_epsilon
    return graph.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def _linear(graph: _Graph, name: str, params: Tree, x: str, output: str | None = None) -> str:
    """y = x W + b."""
    product = graph.node("MatMul", x, graph.constant(f"{name}.kernel", params["kernel"]))
    bias = graph.constant(f"{name}.bias", params["bias"])
    return graph.node("Add", product, bias, name=output)
