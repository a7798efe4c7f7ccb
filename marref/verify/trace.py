"""The named activations of a forward pass, in the order in which they are computed."""

from marref.model import MAR
from marref.trees import Array, Tree


def activations(
    model: MAR, params: Tree, tokens: Array, labels: Array | None = None
) -> dict[str, Array]:
    """Run the model without dropout and name what it computes.

    Parameters
    ----------
    model : MAR
    params : dict
    tokens : integer array [batch, length]
    labels : integer array [batch], optional

    Returns
    -------
    dict of str to array
        In the order of computation; ``<i>`` counts the blocks from 0, and ``class_embedding``,
        what is added at every position, is there where the model has classes:

        ``embedding``                            [batch, length, embed_dim]
        ``class_embedding``                      [batch, embed_dim]
        ``blocks.<i>.attention_norm``            [batch, length, embed_dim]
        ``blocks.<i>.attention.query``           [batch, num_heads, length, head_dim]
        ``blocks.<i>.attention.key``             [batch, num_heads, length, head_dim]
        ``blocks.<i>.attention.value``           [batch, num_heads, length, head_dim]
        ``blocks.<i>.attention.weights``         [batch, num_heads, length, length], keys last
        ``blocks.<i>.attention.context``         [batch, length, embed_dim]
        ``blocks.<i>.attention.output``          [batch, length, embed_dim]
        ``blocks.<i>.feed_forward_norm``         [batch, length, embed_dim]
        ``blocks.<i>.feed_forward.up``           [batch, length, 4·embed_dim]
        ``blocks.<i>.feed_forward.activation``   [batch, length, 4·embed_dim]
        ``blocks.<i>.feed_forward.down``         [batch, length, embed_dim]
        ``blocks.<i>.output``                    [batch, length, embed_dim], the residual stream
        ``final_norm``                           [batch, length, embed_dim]
        ``logits``                               [batch, length, vocab_size]
    """
    logits, cache = model.forward(params, tokens, labels=labels)
    named = {"embedding": cache["embedding"]["output"]}
    if model.num_classes is not None:
        named["class_embedding"] = cache["class_embedding"]["output"]
    for index, block in enumerate(cache["blocks"]):
        attention, feed_forward = block["attention"], block["feed_forward"]
        of_block = {
            "attention_norm": attention["input"],
            "attention.query": attention["query"],
            "attention.key": attention["key"],
            "attention.value": attention["value"],
            "attention.weights": attention["weights"],
            "attention.context": attention["context"],
            "attention.output": attention["output"],
            "feed_forward_norm": feed_forward["input"],
            "feed_forward.up": feed_forward["up"],
            "feed_forward.activation": feed_forward["activation"],
            "feed_forward.down": feed_forward["down"],
            "output": block["output"],
        }
        named |= {f"blocks.{index}.{name}": array for name, array in of_block.items()}
    return {**named, "final_norm": cache["head"], "logits": logits}
