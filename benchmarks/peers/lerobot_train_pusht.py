"""Run by a Python with LeRobot 0.4: trains its diffusion policy for some minutes. See ../time_to_pusht.py.

Arguments: LeRobotDataset v3.0 folder, folder for the policy, minutes, threads, channels of the U-Net's levels (JSON).
Prints the number of updates.
"""

import json
import sys
import time
from pathlib import Path

import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.optim.schedulers import DiffuserSchedulerConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors

BATCH, STEPS = 64, 200_000


def main() -> None:
    root, out, minutes, threads = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (16,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MIN_MAX),
        down_dims=tuple(json.loads(sys.argv[5])),
        crop_shape=None,
        device="cpu",
    )
    offsets = {"observation.state": (-1, 0), "observation.environment_state": (-1, 0), "action": range(-1, 15)}
    dataset = LeRobotDataset(
        "local/pusht", root=root, delta_timestamps={k: [i / 10 for i in v] for k, v in offsets.items()}
    )
    policy = DiffusionPolicy(config)
    before, after = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    optimizer = config.get_optimizer_preset().build(policy.parameters())
    schedule = DiffuserSchedulerConfig(name="cosine", num_warmup_steps=500).build(optimizer, STEPS)
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=1, drop_last=True)
    policy.train()
    updates, began = 0, time.perf_counter()
    while time.perf_counter() - began < 60 * minutes:
        for frames in loader:
            loss, _ = policy.forward(before(frames))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            updates += 1
            if time.perf_counter() - began > 60 * minutes:
                break
    policy.save_pretrained(out)
    before.save_pretrained(out)
    after.save_pretrained(out)
    parameters = sum(p.numel() for p in policy.parameters())
    print(json.dumps({"updates": updates, "seconds": time.perf_counter() - began, "parameters": parameters}))


if __name__ == "__main__":
    main()
