"""One cycle of RNM-TD3 in real weights: `python results/cycle/draw_cycle.py` trains 3,000 steps and draws cycle.png."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import rnm_td3_continuous as rnm  # noqa: E402

ROWS, COLUMNS, LAYER = slice(16, 20), slice(0, 16), "fc2"  # the part that is drawn: of the first critic
moments, refresh = [], rnm.refresh_masks


def snapshot(agent):
    layer = rnm.sparse_layers(agent.qf1)[LAYER]
    W = layer.W.clone().put_(layer.positions, layer.active_weights.detach())  # with the active weights written back
    return W[ROWS, COLUMNS], layer.E[ROWS, COLUMNS]


def watched(agent):
    moments.append(snapshot(agent))  # the end of a cycle ...
    refresh(agent)
    moments.append(snapshot(agent))  # ... and the beginning of the next


rnm.refresh_masks, rnm.hardware_report = watched, lambda *_: None
rnm.train(
    rnm.Args(
        env_id="HalfCheetah-v4",
        n=1,
        m=4,
        total_timesteps=3001,
        learning_starts=1000,
        eval_episodes=1,
        track=False,
        runs_dir="/tmp/cycle",
    )
)
(W, E), (trained, _), (_, new_E) = moments[1], moments[2], moments[3]
kept = int(E[0].sum())
limit = max(W.abs().max(), trained.abs().max()).item()
packed = "packed, one for each group:"
panels = {
    "1": ("the dense W; framed: where the mask E is 1", W, E),
    "2": ("W~ = W * E: the layer computes with these alone", torch.where(E, W, torch.nan), E),
    "3": (f"{packed}\nwhat Adam trains", W[E].view(-1, kept), None),
    "4": (f"{packed}\nafter K = 1,000 updates", trained[E].view(-1, kept), None),
    "5": ("back in W; framed: the new mask", trained, new_E),
    "6": ("the next W~; green: came in, crosses: went out", torch.where(new_E, trained, torch.nan), new_E),
}
mosaic = [["1"] * 16 + ["2"] * 16 + ["3"] * 8, ["4"] * 8 + ["5"] * 16 + ["6"] * 16]
figure, axes = plt.subplot_mosaic(mosaic, figsize=(11, 3.6), layout="constrained")
for name, (title, values, mask) in panels.items():
    ax = axes[name]
    image = ax.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit)
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"{name}  {title}", fontsize=10)
    for row, column in [] if mask is None else mask.nonzero().tolist():
        color = "tab:green" if name in "56" and not E[row, column] else "black"
        ax.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=2, ec=color))
    for row, column in (E & ~new_E).nonzero().tolist() if name == "6" else []:
        ax.plot(column, row, "x", color="tab:red")
    for column in range(4, 16, 4) if mask is not None else []:
        ax.axvline(column - 0.5, color="grey", lw=1.5)
figure.colorbar(image, ax=[*axes.values()], label="weight", shrink=0.8)
figure.savefig(HERE / "cycle.png", dpi=110)
