"""Run by a Python with LeRobot 0.4: windows per second of its diffusion policy's training. See ../training_speed.py."""

import json
import sys
import time
from pathlib import Path

import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors

WORKERS = {"cpu": 2, "cuda": 8}


def main() -> None:
    root, batch, seconds, down_dims = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), json.loads(sys.argv[4])
    device, compiled, half = sys.argv[5], "compiled" in sys.argv[6:], "bf16" in sys.argv[6:]
    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (16,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MIN_MAX),
        down_dims=tuple(down_dims),
        crop_shape=None,
        device=device,
        compile_model=compiled,
    )
    offsets = {"observation.state": (-1, 0), "observation.environment_state": (-1, 0), "action": range(-1, 15)}
    delta = {key: [i / 10 for i in steps] for key, steps in offsets.items()}
    dataset = LeRobotDataset("local/speed", root=root, delta_timestamps=delta)
    policy = DiffusionPolicy(config).to(device)
    preprocessor, _ = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    loader = torch.utils.data.DataLoader(dataset, batch, shuffle=True, num_workers=WORKERS[device], drop_last=True)
    policy.train()
    done, begin = 0, None
    while begin is None or time.perf_counter() - begin < seconds:
        for frames in loader:
            with torch.autocast(device, torch.bfloat16, enabled=half):  # `accelerate launch --mixed_precision bf16`
                loss, _ = policy.forward(preprocessor(frames))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
            optimizer.step()
            done += batch
            if begin is None:  # the first step starts the workers, and compiles
                done, begin = 0, time.perf_counter()
            if time.perf_counter() - begin > seconds:
                break
    print(json.dumps({"windows_per_s": done / (time.perf_counter() - begin)}))


if __name__ == "__main__":
    main()
