"""The model card of an exported folder: what the model is, how it was trained, how it is used; every number is the run's."""

from __future__ import annotations

import yaml

from nanofed.formats.provenance import Provenance

CARD = """\
---
{header}---

# {name}

{intro}

| training | |
|---|---|
{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{address}")
tokenizer = AutoTokenizer.from_pretrained("{address}")
ids = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```

It is a base model: it goes on with a text. The chat template renders conversations as nanochat does, for fine-tuning; the model
has not learnt to answer. It may repeat what stands in its training text, errors and prejudice included. nanochat rounds its
rotary tables to bf16 and transformers does not, so that logits differ by what that rounding makes.
"""


def model_card(provenance: Provenance, licence: str, address: str) -> str:
    """Return the README of an exported model: the header that the Hub reads, the training's figures, and how to load it.

    Args:
        provenance: how the model was trained.
        licence: an identifier of the Hub's, such as `apache-2.0`, or `unknown`.
        address: what `from_pretrained` is to be given.
    """
    federated = provenance.rounds is not None
    header = {
        "license": licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nanochat", "nanofed", *(["federated-learning"] if federated else [])],
    }
    if federated:
        how = ", pretrained across clients with federated averaging of its steps by nanofed"
    else:  # a checkpoint without a config of its run was imported, or lies alone: who trained it is not known
        how = ", pretrained on one machine or cluster by nanofed" if provenance.options else ", in transformers' format"
    return CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        name=provenance.name,
        address=address,
        intro=f"The nanochat GPT of October 2025{how}.",
        facts="\n".join(f"| {what} | {said} |" for what, said in provenance.facts().items()),
    )
