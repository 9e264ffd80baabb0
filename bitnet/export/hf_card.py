"""The model card of an export: README.md with the front matter that a hub reads.

Every number on it comes from the model's config or from the run's metrics; unknown ones are left
out.
"""

from bitnet.export.facts import Facts
from bitnet.model import Transformer


def card(model: Transformer, kind: str, about: str, facts: Facts) -> str:
    """The text of README.md.

    Arguments:
        kind, about: how the weights are stored, as a word and in one line.
    """
    config, counts = model.config, model.config.num_parameters()
    metrics = facts.metrics
    rows: dict[str, object] = {
        "parameters": f"{counts['total']:,} ({counts['matrices']:,} of them ternary)",
        "layers, width, FFN": f"{config.n_layers}, {config.d_model}, {config.d_ff}",
        "heads, key-value heads": f"{config.n_heads}, {config.n_kv_heads}",
        "activation, norms": f"{config.activation}, {config.norm_placement}",
        "vocabulary, context": f"{config.vocab_size:,}, {config.max_seq_len:,}",
        "embeddings": "tied" if config.tie_embeddings else "untied",
        "stored as": f"{kind}: {about}",
    }
    if sources := ", ".join(facts.sources):
        rows["trained on"] = sources.replace("|", "\\|")
    if "tokens" in metrics:
        rows["training tokens"] = f"{metrics['tokens']:,} in {metrics['step']:,} steps"
    if isinstance(metrics.get("val_loss"), float):
        rows["validation loss"] = f"{metrics['val_loss']:.4f} nats per token"
    if isinstance(metrics.get("val_bpb"), float):
        rows["validation bits per byte"] = f"{metrics['val_bpb']:.4f}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- bitnet
- ternary
- 1.58-bit
---

# {facts.name}

A language model with ternary weights (BitNet b1.58, arXiv 2402.17764), trained with bitnet-train.
Weights are -1, 0 or +1 times one scale per matrix, activations are quantized to 8 bits per token.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
inputs = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

transformers needs `accelerate` for it. A prompt begins with the end-of-document token, as in
training; the tokenizer puts it there.
"""
    if facts.config:
        text += f"\n## The run's config\n\n```toml\n{facts.config.strip()}\n```\n"
    return text
