"""What clients may call things, and what is refused before it reaches a policy."""

import numpy as np
import pytest
from serving_helpers import STATE, ImagePolicy

from dipole.data import Feature
from dipole.serving.protocol import Refusal
from dipole.serving.schema import extend, read_observation, schema_of

POLICY = ImagePolicy(height=4, width=6)
SCHEMA = schema_of(POLICY, POLICY.config, rename={"observation/exterior_image_1_left": "observation.images.top"})
IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
TWO = np.array([1.0, 2.0])


@pytest.mark.parametrize(
    "message",
    [
        {STATE: TWO, "observation.images.top": IMAGE},
        {"observation/state": TWO, "observation/images/top": IMAGE},
        {"state": TWO, "images": {"top": IMAGE}},
        {"observation": {"state": [1.0, 2.0], "images": {"top": IMAGE}}, "prompt": "do"},
        {"state": np.float64([1, 2]), "observation/exterior_image_1_left": IMAGE, "observation/gripper": 3},
        {"state": TWO, "images": {"top": np.moveaxis(IMAGE, -1, 0)}},
        {"state": np.stack([TWO, TWO])[1], "images": {"top": IMAGE}},
    ],
    ids=["dipole", "slashes", "nested", "lists", "renamed", "channels first", "rows"],
)
def test_names_and_layouts_that_mean_the_same(message):
    arrays = read_observation(message, SCHEMA)
    assert arrays[STATE].dtype == np.float32
    np.testing.assert_array_equal(arrays[STATE], [TWO])
    np.testing.assert_array_equal(arrays["observation.images.top"], IMAGE[None])


def test_a_whole_history_may_be_sent():
    arrays = read_observation({"state": [[1, 2], [3, 4]], "images": {"top": np.stack([IMAGE, IMAGE])}}, SCHEMA)
    assert [len(value) for value in arrays.values()] == [2, 2]


def test_images_of_floats_go_channels_first():
    image = IMAGE / 255.0
    for layout in (image, np.moveaxis(image, -1, 0)):
        array = read_observation({"state": TWO, "images": {"top": layout}}, SCHEMA)["observation.images.top"]
        assert array.shape == (1, 3, 4, 6)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array[0], np.moveaxis(image, -1, 0).astype(np.float32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state": None}, "not numeric"),
        ({"state": "text"}, "not numeric"),
        ({"state": [[1], [2, 3]]}, "not an array"),
        ({"state": np.zeros(3)}, r"shape \[3\], expected \[2\] or \[2, 2\]"),
        ({"state": np.zeros((3, 2))}, r"shape \[3, 2\]"),
        ({"state": [1, np.nan]}, "not finite"),
        ({"state": [1, -np.inf]}, "not finite"),
        ({"state": [1, 1e300]}, "not finite"),
        ({"images": {"top": np.zeros((4, 6, 4), np.uint8)}}, r"shape \[1, 4, 6, 4\]|shape \[4, 6, 4\]"),
        ({"images": {"top": np.full((4, 6, 3), 2.0)}}, "within 0 and 1"),
        ({"images": {"top": np.full((4, 6, 3), np.nan)}}, "within 0 and 1"),
        ({"images": {"top": np.zeros((4, 6, 3), np.int32)}}, "must be uint8"),
        ({"images": {}}, "'observation.images.top' is missing"),
    ],
)
def test_what_does_not_fit_is_refused_and_named(change, said):
    message = {"state": TWO, "images": {"top": IMAGE}} | change
    with pytest.raises(Refusal, match=said) as caught:
        read_observation(message, SCHEMA)
    assert caught.value.code == "bad-observation"


def test_integer_features_keep_their_type():
    policy = ImagePolicy()
    policy.config.observation = {"observation.mode": Feature("int64", (1,))}
    schema = schema_of(policy, policy.config)
    assert read_observation({"mode": [3]}, schema)["observation.mode"].dtype == np.int64
    with pytest.raises(Refusal, match="not finite"):
        read_observation({"mode": [np.nan]}, schema)


def test_history_repeats_the_first_and_moves_on():
    frames = [{STATE: np.full((1, 2), k, np.float32)} for k in range(5)]
    history = None
    seen = []
    for frame in frames:
        history = extend(history, frame, 3)
        seen.append(history[STATE][:, 0].tolist())
    assert seen == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert extend(history, {STATE: np.zeros((3, 2), np.float32)}, 3)[STATE].sum() == 0
    # After a reload to a policy that looks further back, or less far.
    assert extend(history, frames[0], 5)[STATE][:, 0].tolist() == [2, 2, 3, 4, 0]
    assert extend(history, frames[0], 1)[STATE][:, 0].tolist() == [0]


def test_frame_limit_is_generous_but_bounded():
    honest = 2 * (IMAGE.size + 8 * 2)
    assert 4 * honest < SCHEMA.frame_bytes() < 2**20 + 100 * honest
