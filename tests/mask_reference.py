"""A DiT sampled by hand: the pipeline's loop and the transformer's forward, unrolled, with reuse written into them."""

from dataclasses import dataclass, field

import torch
from tiny import call_arguments
from torch.nn.functional import silu


@dataclass
class Reuse:
    """Values of one run: computed where the table says so, else what Newton's form makes of the last ones."""

    rows: tuple
    columns: dict
    order: int = 0
    step: int = 0
    kept: dict = field(default_factory=dict)

    def __call__(self, kind, block, compute):
        if (kind, block) not in self.columns:
            return compute()
        values = self.kept.setdefault((kind, block), [])
        if self.rows[self.step][self.columns[kind, block]] == "1":
            values.insert(0, (self.step, compute()))
            del values[self.order + 1 :]
            return values[0][1]
        return newton(values, self.step)


def newton(values, at):
    """Newton's interpolation by divided differences, exact for polynomials of degree len(values) - 1."""
    steps = [step for step, _ in values]
    table = [value.double() for _, value in values]
    total, factor = table[0], 1.0
    for level in range(1, len(values)):
        table = [
            (table[index] - table[index + 1]) / (steps[index] - steps[index + level]) for index in range(len(table) - 1)
        ]
        factor *= at - steps[level - 1]
        total = total + factor * table[0]
    return total.to(values[0][1].dtype)


@torch.no_grad()
def sample_dit(pipe, reuse, steps, batch=2, guidance=4.0):
    """Latents of ``DiTPipeline`` with guidance, (batch, 4, 4, 4)."""
    arguments = call_arguments(pipe, batch)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.cat([torch.randn(1, 4, 4, 4, generator=generator) for generator in arguments["generator"]])
    labels = torch.tensor(arguments["class_labels"] + [1000] * batch)
    for reuse.step, t in enumerate(scheduler.timesteps):
        output = forward(pipe.transformer, torch.cat([x, x]), t.expand(2 * batch), labels, reuse)
        conditional, unconditional = output.chunk(2)
        x = scheduler.step(unconditional + guidance * (conditional - unconditional), t, x).prev_sample
    return x


def forward(network, x, t, labels, reuse):
    h = network.pos_embed(x)
    for index, block in enumerate(network.transformer_blocks):
        h = h + reuse("block", index, lambda block=block, h=h, index=index: change(block, h, t, labels, index, reuse))
    shift, scale = network.proj_out_1(silu(network.transformer_blocks[0].norm1.emb(t, labels))).chunk(2, dim=1)
    h = network.proj_out_2(network.norm_out(h) * (1 + scale[:, None]) + shift[:, None])
    side, patch, channels = int(h.shape[1] ** 0.5), network.patch_size, network.out_channels
    h = torch.einsum("nhwpqc->nchpwq", h.reshape(-1, side, side, patch, patch, channels))
    return h.reshape(-1, channels, side * patch, side * patch)


def change(block, h, t, labels, index, reuse):
    """What a block adds to its stream."""
    normed, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(h, t, labels, hidden_dtype=h.dtype)
    after = h + gate[:, None] * reuse("attention", index, lambda: block.attn1(normed))
    normed = block.norm3(after) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    after = after + gate_mlp[:, None] * reuse("mlp", index, lambda: block.ff(normed))
    return after - h
