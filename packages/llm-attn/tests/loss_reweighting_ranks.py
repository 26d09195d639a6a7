"""Two ranks of data parallelism, each a process, on gloo; run by test_loss_reweighting.py.

    python loss_reweighting_ranks.py FOLDER

writes what each rank computed, and what one process does with the batches of both, to FOLDER. A script of its own for
the reason given in attention_residuals_ranks.py.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from llm_attn.loss_reweighting import (
    LossReweighter,
    LossReweightingConfig,
    ReweightedTrainer,
    losses_for_logits,
    next_targets,
    per_sample_losses,
    sample_means,
)
from llm_attn.loss_reweighting import samples as samples_module
from llm_attn.testing import tiny_model, tokens

RANKS, STEPS, ROWS, LENGTH = 2, 2, 3, 11
TRAININGS = {  # name -> micro-batches of a step on each rank, settings
    "micro": (1, {}),
    "window": (2, {"scope": "window"}),
    "ema": (1, {"scope": "ema"}),
    "from logits": (1, {"head": "logits"}),
    "warm-up": (1, {"warmup_steps": 9}),
}


def ragged_samples():
    """Inputs, targets and numbers of tokens of five samples of the first rank and three of the second."""
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(8, 4, generator=draw, dtype=torch.float64), torch.randn(8, generator=draw, dtype=torch.float64)
    return x, y, torch.tensor([3, 1, 0, 4, 1, 5, 9, 2])


def ragged(own):
    """Loss, and gradient averaged over ranks, of a linear model on these of the samples."""
    x, y, numbers = (each[own] for each in ragged_samples())
    p = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    reweight = LossReweighter("linupper", r=0.3, warmup_steps=1)
    found = []
    for step in (0, 1):
        losses = (x @ p - y).square()
        loss = reweight(losses.masked_fill(numbers == 9, torch.inf), step=step, num_tokens=numbers)
        both = torch.cat([loss.detach()[None], *torch.autograd.grad(loss, p)])
        if dist.is_initialized():
            dist.all_reduce(both)
            both /= RANKS
        found.append(both)
    return {"loss and gradient": torch.stack(found), "left out": reweight.nonfinite_losses}


def parts_of_rows(rank=None):
    """Means of rows of which each rank holds half (sequence parallelism), and the averaged gradient of the head."""
    draw = torch.Generator().manual_seed(4)
    hidden = torch.randn(3, 8, 5, generator=draw, dtype=torch.float64)
    head = torch.randn(7, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (3, 8), generator=draw)
    targets = next_targets(labels)
    targets[0, 1:5] = -100
    own = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    losses = torch.nn.functional.cross_entropy(
        (hidden[:, own] @ head.T).mT, targets[:, own], ignore_index=-100, reduction="none"
    )
    samples = sample_means(losses, targets[:, own], sequence_group=None if rank is None else dist.group.WORLD)
    reweight = LossReweighter("linupper", r=0.5, warmup_steps=0)
    factors = reweight.factors(samples.losses, step=0) if rank is None else samples.losses.new_tensor([0.2, 0.5, 0.3])
    (gradient,) = torch.autograd.grad((samples.losses * torch.tensor([0.2, 0.5, 0.3])).sum(), head)
    if rank is not None:
        dist.all_reduce(gradient)
        gradient /= RANKS
    return {"losses": samples.losses.detach(), "tokens": samples.num_tokens, "gradient": gradient, "n": len(factors)}


def rows(count):
    """Rows whose labels leave out the first tokens of some, so that they differ in length."""
    given = [{"input_ids": ids, "labels": ids.clone()} for ids in tokens(count, LENGTH, seed=7)]
    for number, row in enumerate(given):
        row["labels"][: number % 4 * 2] = -100
    return given


def trained(name, *, ranks):
    """Parameters after two steps of plain SGD, and the last weights, by a Trainer on `ranks` processes."""
    micro, settings = TRAININGS[name]
    alone = RANKS // ranks
    model = tiny_model("llama", num_hidden_layers=1).train()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, max_steps=STEPS, optim="sgd",
            learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True, seed=1,
            per_device_train_batch_size=ROWS * alone, gradient_accumulation_steps=micro,
            ddp_backend="gloo" if ranks > 1 else None,
        )  # fmt: skip
        config = LossReweightingConfig(**{"warmup_steps": 0, "r": 0.4} | settings)
        trainer = ReweightedTrainer(
            model=model, args=args, train_dataset=rows(RANKS * ROWS * micro * STEPS), reweighting=config
        )
        trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = trainer.reweighter.last_weights
    weights = None if weights is None else weights.sort().values
    return {"parameters": [p.detach().clone() for p in model.parameters()], "weights": weights, "logged": logged}


def sharded(rank):
    """Gradients of a loop of one's own with FSDP; the loss goes through the model's own forward."""
    model = tiny_model("llama", num_hidden_layers=1).train()
    ids = tokens(RANKS * ROWS, LENGTH, seed=8)
    reweight = LossReweighter("linupper", r=0.4, warmup_steps=0)
    if rank is None:
        samples = per_sample_losses(model.model(ids).last_hidden_state, model.lm_head.weight, ids)
        reweight(samples.losses, step=0).backward()
        return {name: p.grad for name, p in model.named_parameters()}
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    fully_shard(model.model.layers[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = ids[rank * ROWS : (rank + 1) * ROWS]
    targets = next_targets(own)
    with losses_for_logits(model, targets):
        losses = model(own).logits.squeeze(-1)
    reweight(sample_means(losses, targets).losses, step=0).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def run_rank(rank, folder, port):
    torch.set_num_threads(1)
    samples_module.FEW_LOGITS = 0  # as large models have it
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    found = {name: trained(name, ranks=RANKS) for name in TRAININGS}
    found["ragged"] = ragged(slice(0, 5) if rank == 0 else slice(5, 8))
    found["parts of rows"] = parts_of_rows(rank)
    found["sharded"] = sharded(rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_alone(folder):
    torch.set_num_threads(1)
    found = {name: trained(name, ranks=1) for name in TRAININGS}
    found["ragged"] = ragged(slice(0, 8))
    found["parts of rows"] = parts_of_rows()
    found["sharded"] = sharded(None)
    torch.save(found, folder / "alone.pt")


if __name__ == "__main__":
    context, here = multiprocessing.get_context("fork"), Path(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    processes = [context.Process(target=run_rank, args=(rank, here, number)) for rank in range(RANKS)]
    processes.append(context.Process(target=run_alone, args=(here,)))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))
