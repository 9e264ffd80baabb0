"""A Hugging Face Llama, made ternary by one line and trained with transformers' Trainer.

    pip install -e ".[examples]"
    python examples/trainer.py

The Trainer needs nothing special: a BitLinear has the parameters and the gradients of an nn.Linear.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from bitnet import coverage, pack, replace_linear

CONTEXT = 32


def windows() -> list[dict[str, Tensor]]:
    """A data set: the source of argparse as bytes, in windows of CONTEXT tokens."""
    data = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    parts = data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return [{"input_ids": part, "labels": part} for part in parts]


def main(steps: int = 20) -> list[float]:
    """Train, pack, compare; returns the loss of each step in nats per byte."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    replace_linear(model, skip=("lm_head",))
    print(coverage(model))

    data = windows()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1.0, "it has not learned"

    tokens = data[0]["input_ids"].unsqueeze(0).to(model.device)
    with torch.no_grad():
        before = model.eval()(input_ids=tokens).logits
        pack(model)  # 2 bits per weight
        assert torch.equal(model(input_ids=tokens).logits, before)
    print("packed; the same logits, bit for bit")
    return losses


if __name__ == "__main__":
    main()
