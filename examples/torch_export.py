"""torch.export of a packed model, with a dynamic batch.

    python examples/torch_export.py

The exported program is one graph whose ternary products are calls of bitnet's operators. It takes
any batch size, gives the model's logits bit for bit, and can be saved as a .pt2 file. A process
that loads the file must first import `bitnet_kernels`, which registers the operators.
"""

import io

import torch

from bitnet import Transformer, pack
from bitnet.model import ModelConfig

CONTEXT = 16


def main() -> str:
    """Export, save, load and compare; returns the program's code."""
    torch.manual_seed(0)
    config = ModelConfig(depth=2, d_model=64, vocab_size=256, max_seq_len=CONTEXT)
    model = pack(Transformer(config).eval())

    example = torch.randint(256, (2, CONTEXT))
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()  # or a path that ends in .pt2
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)

    products = str(loaded.graph).count("torch.ops.bitnet.ternary_linear")
    print(f"{products} packed products in the graph, {file.getbuffer().nbytes:,} bytes")
    for size in (1, 2, 7, 64):
        tokens = torch.randint(256, (size, CONTEXT))
        with torch.no_grad():
            assert torch.equal(loaded.module()(tokens), model(tokens)), size
    print("batches of 1, 2, 7 and 64: the model's logits, bit for bit")
    return loaded.graph_module.code


if __name__ == "__main__":
    main()
