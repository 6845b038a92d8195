"""`slimba pretrain`: a Mamba or Mamba-2 from scratch with the same loop as every method.

The bundled demo-teacher is rebuilt by `scripts/make_demo_teacher.sh`, which calls this. Tests: tests/training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

import slimba
from slimba.checkpoints.atomic import check_target
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import write_packed
from slimba.data.batches import WindowBatches
from slimba.data.tokenizer import Tokenizer
from slimba.data.tokens import open_tokens
from slimba.formats import MatrixLayout
from slimba.formats.floats import DTYPES
from slimba.models.lm import SSMForCausalLM, init_weights
from slimba.models.spec import ModelSpec
from slimba.training import distributed
from slimba.training.loop import Group, LoopSettings, pick_device, recomputes, train
from slimba.training.losses import cross_entropy
from slimba.training.recipes import load_recipe
from slimba.training.workdir import finish_work, prepare_work, work_of

__all__ = ["PretrainRecipe", "pretrain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainRecipe:
    """Settings; `slimba/recipes/pretrain.yaml` is the default and explains every key."""

    METHOD: ClassVar[str] = "pretrain"

    architecture: Literal["mamba1", "mamba2"]
    d_model: int
    n_layer: int
    expand: int
    d_state: int
    headdim: int
    n_groups: int
    window: int
    batch: int
    micro_batch: int
    activation_checkpointing: Literal["auto", "on", "off"]
    passes: float
    lr: float
    weight_decay: float
    warmup: float
    decay: str
    grad_clip: float
    dtype: Literal["float16", "bfloat16", "float32"]

    def spec(self, tokenizer: Tokenizer) -> ModelSpec:
        mamba2 = self.architecture == "mamba2"
        d_inner = self.expand * self.d_model
        eot = tokenizer.eot_id
        return ModelSpec(
            architecture=self.architecture,
            n_layer=self.n_layer,
            d_model=self.d_model,
            d_inner=d_inner,
            d_state=self.d_state,
            vocab_size=-(-tokenizer.n_vocab // 16) * 16,
            headdim=self.headdim if mamba2 else 0,
            n_groups=self.n_groups if mamba2 else 1,
            norm_group_size=d_inner // self.n_groups if mamba2 else 0,
            dt_rank=0 if mamba2 else -(-self.d_model // 16),
            bos_token_id=eot,
            eos_token_id=eot,
            add_bos=eot is not None,
        )


class PretrainTask:
    """Next-token cross-entropy."""

    def __init__(self, model: SSMForCausalLM, recipe: PretrainRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.device = next(model.parameters()).device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model.set_recompute(recomputes(recipe.activation_checkpointing, model.spec))

    def groups(self) -> list[Group]:
        r = self.recipe
        matrices = {n + ".weight" for n in self.model.spec.matrices() if ".mixer." in n}
        decayed = [p for n, p in self.model.named_parameters() if n in matrices]
        rest = [p for n, p in self.model.named_parameters() if n not in matrices]
        return [Group("matrices", decayed, r.lr, r.weight_decay), Group("rest", rest, r.lr)]

    def at_step(self, step: int, total: int) -> bool:
        return False

    def loss(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features, _ = self.model.features(ids[:, :-1])
        return {"loss": cross_entropy(features, self.model.head_weight, ids[:, 1:], self.dtype)}


def pretrain(
    out: str | Path,
    *,
    data: Sequence[str | Path],
    tokenizer: str | Path,
    recipe: str | Path | None = None,
    split_documents: str = "blank-line",
    tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Train a model from scratch into the packed directory `out` (float weights); returns the run's record.

    data: text files, `datasets:NAME`, or files of token ids (docs/data.md). tokens: None takes the recipe's passes over
    the text. Started by torchrun, the processes share every batch.
    """
    out = Path(out)
    check_target(out, overwrite=overwrite)
    chosen = load_recipe(PretrainRecipe, "pretrain.yaml", recipe, {**(settings or {}), **more})
    words = Tokenizer.from_file(tokenizer)
    spec = chosen.spec(words)
    reading = open_tokens(data, words, bos_id=spec.bos_token_id, n_vocab=spec.vocab_size, split=split_documents)
    with reading as ids, distributed.group(pick_device(device)) as where:
        distributed.share(chosen.batch)
        batches = WindowBatches(ids, chosen.window, chosen.batch, seed)
        if tokens is None:
            tokens = round(chosen.passes * batches.n_windows * chosen.window)
        loop = LoopSettings(
            steps=batches.steps_for(tokens),
            warmup=chosen.warmup,
            decay=chosen.decay,
            clip=chosen.grad_clip,
            betas=(0.9, 0.95),
            micro_batch=chosen.micro_batch,
            label="pretraining",
        )
        record = {
            "method": "pretrain",
            "slimba": slimba.__version__,
            "recipe": dataclasses.asdict(chosen),
            "seed": seed,
            "data": {"sources": [Path(d).name for d in data]} | batches.tokens.origin,
            "steps": loop.steps,
            "tokens": loop.steps * batches.tokens_per_step,
        }
        work = work_of(out)
        distributed.from_first(lambda: prepare_work(work, record, resume))
        model = SSMForCausalLM(spec)
        init_weights(model, seed)
        model.to(where)
        progress = train(PretrainTask(model, chosen), batches, loop, work, resume=resume)
        record |= {
            "device": distributed.name_of(where),
            "seconds": round(progress.seconds, 1),
            "final": {k: round(v, 5) for k, v in progress.last.items()},
        }
        if distributed.first():
            packed = to_checkpoint(model, chosen.dtype, Path(tokenizer), record)
            write_packed(packed, out, card=card(record), overwrite=overwrite)
            finish_work(work, out)
    return record


def to_checkpoint(model: SSMForCausalLM, dtype: str, tokenizer: Path, record: dict[str, Any]) -> Checkpoint:
    """The network's weights as a float checkpoint (A_log, D and dt_bias stay float32)."""
    spec = model.spec
    kinds = spec.vectors()
    tensors = {}
    for name, p in model.state_dict().items():
        stays = name in kinds and kinds[name][1] == "ssm"
        tensors[name] = p.detach().float().cpu().numpy().astype(DTYPES["float32" if stays else dtype])
    return Checkpoint(
        spec=spec,
        layouts={name: MatrixLayout.plain(rows, cols, dtype) for name, (rows, cols) in spec.matrices().items()},
        tensors=tensors,
        tokenizer_file=tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json",
        provenance=record,
    )


def card(record: dict[str, Any]) -> str:
    final = ", ".join(f"{k} {v}" for k, v in record["final"].items())
    return (
        f"Language model trained from scratch with `slimba pretrain` on {record['tokens']:,} tokens"
        f" ({record['steps']:,} steps). Last training figures: {final}.\n"
    )
