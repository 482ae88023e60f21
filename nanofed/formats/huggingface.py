"""The folder that transformers loads as its own `NanoChatForCausalLM`, written and read; and the Hugging Face Hub.

transformers' NanoChat is nanochat of October 2025 (huggingface.co/docs/transformers/model_doc/nanochat). One difference is in no
config: nanochat rounds its rotary tables to bf16, and transformers computes them in the dtype of the activations.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanofed.errors import ConfigError, DataError
from nanofed.formats.pretrained import Pretrained, listed
from nanofed.model import GPTConfig
from nanofed.model.layers import ROTARY_BASE
from nanofed.model.loss import LOGIT_CAP
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.tokenizer.storage import TOKENIZER_JSON, to_json
from nanofed.training.checkpoint.atomic import CheckpointError

logger = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_SIZE = "5GB"
ASSISTANT_END = "<|assistant_end|>"
EPS = torch.finfo(torch.float32).eps  # what F.rms_norm takes for fp32, 1.19e-7; transformers' own default is 1e-6
LARGEST_EPS = 1e-6  # with transformers' default logits differ by less than 5e-5

# GPTConfig's sizes under transformers' names.
SIZES = {
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
}
# What this GPT does whatever its sizes are.
FIXED = {
    "model_type": "nanochat",
    "hidden_act": "relu2",
    "final_logit_softcapping": LOGIT_CAP,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
# nanochat's names of a block's matrices under transformers'.
BLOCK = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

# A conversation as nanochat renders it: a system message goes in front of the user's first one; an assistant's message may
# be a list of parts of type text, python (a call) and python_output (what it returned).
CHAT_TEMPLATE = "".join(
    (
        "{{ bos_token }}",
        "{% if messages[0]['role'] == 'system' %}",
        "{% set system = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}",
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}",
        "{% for turn in turns %}",
        "{% if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}",
        "{{ raise_exception('turns must alternate between user and assistant, and begin with user') }}{% endif %}",
        "{% if turn['role'] == 'user' %}",
        "{{ '<|user_start|>' + (system if loop.first else '') + turn['content'] + '<|user_end|>' }}",
        "{% else %}{{ '<|assistant_start|>' }}",
        "{% if turn['content'] is string %}{{ turn['content'] }}{% else %}{% for part in turn['content'] %}",
        "{% if part['type'] == 'python' %}{{ '<|python_start|>' + part['text'] + '<|python_end|>' }}",
        "{% elif part['type'] == 'python_output' %}{{ '<|output_start|>' + part['text'] + '<|output_end|>' }}",
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}",
        "{{ '<|assistant_end|>' }}{% endif %}{% endfor %}",
        "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}",
    )
)


def write(folder: Path, model: Pretrained, *, dtype: torch.dtype, card: str) -> None:
    """Write everything that `AutoModelForCausalLM` and `AutoTokenizer` load, and the model card, into an empty folder.

    Weights of more than 5 GB are divided over several files with an index.

    Raises:
        ConfigError: the model has parts that transformers' NanoChat has no place for; they are named.
    """
    from huggingface_hub import save_torch_state_dict

    weights = {name: weight.to(dtype) for name, weight in renamed(model).items()}
    config = model_config(model.config, model.tokenizer, dtype)
    save_torch_state_dict(weights, folder, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})
    bos = model.tokenizer.bos_token_id
    ends = [bos, *(id_ for text, id_ in model.tokenizer.special_tokens.items() if text == ASSISTANT_END)]
    generation = {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": bos}
    for name, content in (
        (CONFIG, config),
        ("generation_config.json", generation),
        (TOKENIZER_JSON, tokenizer_file(model.tokenizer)),
        ("tokenizer_config.json", tokenizer_config(model.tokenizer, model.config)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def renamed(model: Pretrained) -> dict[str, Tensor]:
    """Return a model's weights under transformers' names.

    Raises:
        ConfigError: transformers' NanoChat has no place for some of its weights or sizes; they are named.
    """
    names = _names(model.config.n_layer)
    parts = sorted(model.weights.keys() - names.keys()) + sorted(asdict(model.config).keys() - SIZES.keys())
    if parts:
        raise ConfigError(
            f"{model.path} has parts that transformers' NanoChat cannot express: {listed(parts)}; "
            "export it with --to nanochat or --to torch"
        )
    model.check()
    return {theirs: model.weights[ours] for ours, theirs in names.items()}


def model_config(config: GPTConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of `config.json`."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        **FIXED,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "intermediate_size": 4 * config.n_embd,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.bos_token_id,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def tokenizer_file(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of `tokenizer.json`: our own, which also puts the token that begins a document before a text."""
    content: dict[str, Any] = json.loads(to_json(tokenizer.vocabulary))
    bos, bos_id = tokenizer.vocabulary.special_tokens[0], tokenizer.bos_token_id
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    return content


def tokenizer_config(tokenizer: Tokenizer, config: GPTConfig) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`; the chat template is there where its special tokens are."""
    bos, *others = tokenizer.vocabulary.special_tokens
    turns = {f"<|{role}_{place}|>" for role in ("user", "assistant", "python", "output") for place in ("start", "end")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.sequence_len,
        "bos_token": bos,
        "eos_token": bos,  # the token that begins the next document ends this one
        "pad_token": bos,
        "additional_special_tokens": others,
        "clean_up_tokenization_spaces": False,
        **({"chat_template": CHAT_TEMPLATE} if turns <= set(others) else {}),
    }


def read(folder: Path) -> Pretrained:
    """Read a folder of transformers' NanoChat, whoever wrote it; its weights are returned in fp32.

    Raises:
        CheckpointError: it is damaged, of another architecture, or differs from this GPT in something; that is named.
        DataError: its `tokenizer.json` is not a byte-level BPE such as nanofed's.
    """
    config = _read_config(folder)
    names = {theirs: ours for ours, theirs in _names(config.n_layer).items()}
    weights = {
        names.get(name, name): tensor.float() for path in _weight_files(folder) for name, tensor in _load(path).items()
    }
    return Pretrained(config, weights, Tokenizer.load(folder), folder)


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the Hub and return its address; a repository that is not there yet is made a private one.

    The library takes the token of `hf auth login` or of `HF_TOKEN`.

    Raises:
        DataError: the Hub cannot be reached, or refuses; says why.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by nanofed"))
    except Exception as error:  # of the HTTP library, which is another one in each version of huggingface_hub
        no_token = isinstance(error, LocalTokenNotFoundError)
        reason = "there is no token for the Hub: run `hf auth login`" if no_token else error
        raise DataError(f"--push {repository}: {folder} is written, and was not uploaded: {reason}") from error


def check_repository(name: str) -> None:
    """Refuse a name that no repository of the Hub can have.

    Raises:
        ConfigError: it is not of the form OWNER/NAME.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push {name!r:.80}: {error}") from error
    if name.count("/") != 1:
        raise ConfigError(f"--push {name!r:.80}: name the repository as OWNER/NAME")


def _names(layers: int) -> dict[str, str]:
    """Return transformers' name of every weight by nanochat's, in the order of the model."""
    blocks = {
        f"transformer.h.{layer}.{ours}.weight": f"model.layers.{layer}.{theirs}.weight"
        for layer in range(layers)
        for ours, theirs in BLOCK.items()
    }
    return {
        "transformer.wte.weight": "model.embed_tokens.weight",
        **blocks,
        "lm_head.weight": "lm_head.weight",
    }


def _read_config(folder: Path) -> GPTConfig:
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        theirs = {name: content.get(name, expected) for name, expected in FIXED.items()}
        sizes = {ours: content[name] for ours, name in SIZES.items()}
        wide, eps = content["intermediate_size"], float(content["rms_norm_eps"])
        rope = {"rope_theta": content.get("rope_theta")}  # transformers 4 has it here, and the rest in `rope_scaling`
        rope |= {**(content.get("rope_parameters") or {}), **(content.get("rope_scaling") or {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read, or is no config of transformers' NanoChat: {error!r}") from error
    expected = {
        **FIXED,
        "intermediate_size": 4 * sizes["n_embd"] if isinstance(sizes["n_embd"], int) else None,
        "rope_theta": ROTARY_BASE,
        "rope_type": "default",
    }
    theirs |= {
        "intermediate_size": wide,
        "rope_theta": rope.get("rope_theta"),
        "rope_type": rope.get("type", rope.get("rope_type", "default")),
    }
    differing = [f"{name} {theirs[name]} there, {here} here" for name, here in expected.items() if theirs[name] != here]
    if not 0 < eps <= LARGEST_EPS:
        differing.append(f"rms_norm_eps {eps} there, {EPS:.3g} here")
    if differing:
        raise CheckpointError(f"{path} is of another model than this GPT: {'; '.join(differing)}")
    try:
        return GPTConfig(**sizes)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            files = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            strange = sorted(name for name in files if Path(name).name != name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX} cannot be read: {error!r}") from error
        if strange:
            raise CheckpointError(f"{folder / INDEX} names {strange[0]!r}, which is no file of its folder")
        return [folder / name for name in sorted(files)]
    return [folder / WEIGHTS]


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
