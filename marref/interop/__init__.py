"""MAR in other frameworks: their names and layouts of its parameters, one file a framework.

`marref.interop.torch`, `marref.interop.flax` and `marref.interop.axon` need NumPy alone, whatever
their names say.  Each has

    to_params(state)      a complete state -> the tree of parameters
    to_names(arrays)      any of its arrays, by flat names -> arrays by marref's dotted names

and the way back, under the name that the framework has for it: `torch.to_state_dict`,
`flax.to_variables` (linen), `flax.to_pure_dict` (nnx), `axon.to_model_state`.  A gradient has the
name and layout of its parameter, so all of this holds for gradients too.

`marref.interop.maps` reads and writes names and layouts of your own.  `marref.interop.onnx`, which
has to be imported by itself, writes a model as a graph.
"""

from marref.interop import axon, flax, maps, torch

__all__ = ["axon", "flax", "maps", "torch"]
