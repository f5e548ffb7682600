"""Write the table of docs/backbones.md: what works with which family, tried on a small random model of each.

    python scripts/backbones.py            # prints the table
    python scripts/backbones.py --write    # puts it into docs/backbones.md

A family's own configuration class is loaded, made narrow, and built with random weights. Then UnoLoRA is put on its
default projections, with each conditioning, a forward and a backward of a mixed batch are run, a sample alone is
compared with the same sample in the batch, and one task is merged and compared.
"""

import argparse
import re
import warnings
from pathlib import Path

import torch
import transformers as tf
from peft import get_peft_model

from unolora import UnoLoraConfig
from unolora.model import TARGET_MODULES, named_targets

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
PLACE = re.compile(r"(<!-- table: backbones -->\n).*?(<!-- end -->)", re.S)
NARROW = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32, "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8,
    "intermediate_size": 48, "d_ff": 48, "n_inner": 48, "hidden_dim": 48, "ffn_dim": 48, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "rotary_dim": 8, "num_local_experts": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 0, "image_size": 16, "patch_size": 8, "attention_types": [[["global", "local"], 1]],
    "global_attn_every_n_layers": 2, "sliding_window": 16, "query_pre_attn_scalar": 8, "sep_token_id": 2,
    "cls_token_id": 1, "pooler_hidden_size": 32, "attention_hidden_size": 32, "context_length": 64,
    "intermediate_size_mlp": 48, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
}  # fmt: skip
"""Setting -> its narrow value, where a family has a setting of that name."""
DERIVED = ("layer_types", "attention_layers", "no_rope_layers", "moe_layers", "per_layer_config", "attribute_map")
"""Settings that follow from the number of layers, and are left to the family."""
KINDS = (  # the first that knows a family is its kind
    ("vision", tf.AutoModelForImageClassification, tf.AutoModelForImageClassification),
    ("encoder-decoder", tf.AutoModelForSeq2SeqLM, tf.AutoModelForSeq2SeqLM),
    ("encoder", tf.AutoModelForMaskedLM, tf.AutoModelForSequenceClassification),
    ("decoder", tf.AutoModelForCausalLM, tf.AutoModelForCausalLM),
)
TASKS = ["one", "two"]
CONDITIONINGS = ("none", "task", "task+sample")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/backbones.md")
    parser.add_argument("family", nargs="*", help="only these; default: all with default projections")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    families = options.family or sorted(set(TARGET_MODULES) & set(tf.CONFIG_MAPPING))
    rows = [row(family) for family in families]
    table = "\n".join([
        "| family | kind | default projections | UnoLoRA | UnoLoRA\\*, task | UnoLoRA\\*, task+sample | merged |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ])  # fmt: skip
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(PLACE.sub(lambda place: f"{place[1]}\n{table}\n\n{place[2]}", page), encoding="utf-8")
    else:
        print(table)


def row(family: str) -> str:
    """One line of the table."""
    projections = named_targets(None, {"model_type": family})
    named = f"`{projections}`" if isinstance(projections, str) else ", ".join(projections)
    named = named.replace("|", "\\|")
    try:
        kind, _ = build(family)
    except Exception as error:
        return f"| {family} | not tried: {short(error)} | {named} | - | - | - | - |"
    found = [attempt(lambda c=c: check(build(family)[1], kind, c)) for c in CONDITIONINGS]
    merged = attempt(lambda: check_merged(build(family)[1], kind))
    return f"| {family} | {kind} | {named} | {' | '.join([*found, merged])} |"


def attempt(do) -> str:
    """Return "yes", or why not."""
    try:
        do()
    except Exception as error:
        return f"no: {short(error)}"
    return "yes"


def short(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:90]}"


def build(family: str) -> tuple[str, torch.nn.Module]:
    """A narrow random model of a family, with its kind."""
    config = narrow(tf.CONFIG_MAPPING[family]())
    torch.manual_seed(0)
    for kind, known, auto in KINDS:
        if type(config) in known._model_mapping:
            config.num_labels = 2
            return kind, auto.from_config(config).eval()
    raise ValueError("no class with a head of the kinds tried")


def narrow(config: tf.PreTrainedConfig) -> tf.PreTrainedConfig:
    """The same family with narrow settings, also in the configurations inside."""
    found = {k: v for k, v in config.to_dict().items() if k not in ("model_type", *DERIVED)}
    for name in type(config).sub_configs:
        if getattr(config, name, None) is not None:
            found[name] = narrow(getattr(config, name)).to_dict()
    return type(config)(
        **{name: NARROW.get(name, value) if value is not None else None for name, value in found.items()}
    )


def batch(model: torch.nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """Three samples of different lengths."""
    torch.manual_seed(1)
    if kind == "vision":
        size = model.config.image_size
        return {"pixel_values": torch.randn(3, model.config.num_channels, size, size)}
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 5 + [0] * 2])
    inputs = {"input_ids": torch.randint(3, 60, (3, 7)) * mask, "attention_mask": mask}
    if kind == "encoder-decoder":
        inputs["decoder_input_ids"] = torch.randint(3, 60, (3, 4))
        inputs["decoder_input_ids"][:, -1] = 2
        inputs["input_ids"][torch.arange(3), mask.sum(1) - 1] = 2
    return inputs


def adapted(model: torch.nn.Module, conditioning: str) -> torch.nn.Module:
    """UnoLoRA on the default projections, with a B that is felt."""
    found = get_peft_model(model, UnoLoraConfig(tasks=list(TASKS), conditioning=conditioning, r=2))
    torch.manual_seed(2)
    for name, parameter in found.named_parameters():
        if ".uno_B" in name:
            parameter.data.normal_(std=0.2)
    return found


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **more: object) -> torch.Tensor:
    return model(**inputs, **more).logits


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4 * max(1.0, float(b.abs().max())))


def check(model: torch.nn.Module, kind: str, conditioning: str) -> None:
    """Raise where a mixed batch is not what its samples alone are, or nothing is learned."""
    inputs = batch(model, kind)
    with torch.no_grad():
        bare = logits(model, inputs)
    model = adapted(model, conditioning).eval()
    mixed = logits(model, inputs, tasks=["two", "one", "one"])
    if same(mixed, bare):
        raise ValueError("the adapter is not felt")
    mixed.float().square().mean().backward()
    grads = [parameter.grad for name, parameter in model.named_parameters() if ".uno_A" in name]
    if not all(grad is not None and grad.isfinite().all() for grad in grads):
        raise ValueError("a projection gets no gradient")
    with torch.no_grad():
        length = int(inputs["attention_mask"][1].sum()) if kind != "vision" else 0
        alone = {k: v[1:2, :length] if k in ("input_ids", "attention_mask") else v[1:2] for k, v in inputs.items()}
        found = logits(model, alone, tasks=["one"])
        wanted = mixed[1:2, : found.shape[1]] if kind == "decoder" else mixed[1:2]
    if not same(found, wanted):
        raise ValueError("a sample in a padded batch is not what it is alone")


def check_merged(model: torch.nn.Module, kind: str) -> None:
    """Raise where merging a task changes what it says."""
    inputs = batch(model, kind)
    model = adapted(model, "task").eval()
    with torch.no_grad():
        wanted = logits(model, inputs, tasks="two")
        merged = logits(model.merge_and_unload(tasks="two"), inputs)
    if not same(merged, wanted):
        raise ValueError("it differs")


if __name__ == "__main__":
    main()
