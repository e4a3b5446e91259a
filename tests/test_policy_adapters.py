"""Adapters of published policies, against stand-ins of the interfaces that their projects document.

The stand-ins record what they are given and answer with known numbers: what is tested is everything around the weights.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.policies import adapter, images, openvla, pretrained, rt1x
from workflow_src.policies.wire import WireError

WIDOWX, GOOGLE, LIBERO = (
    sections.Lab(embodiment=name, image_size=256) for name in ("widowx", "google_robot", "libero")
)
LIMITS = {"action": {"q01": [-0.03] * 6 + [0.0], "q99": [0.03] * 6 + [1.0]}}
ANSWER = np.array([0.01, -0.02, 0.03, 0.1, 0.2, -0.3, 0.7])


def observe(rows=3, step=0, size=256, prompt="Put the Carrot on the plate"):
    picture = np.random.default_rng(step).integers(0, 256, (rows, size, size, 3), np.uint8)
    number = np.arange(rows)
    return adapter.Observation(picture, [prompt] * rows, number, np.full(rows, step), number + 100)


def row_of(observation, row):
    keep = slice(row, row + 1)
    return adapter.Observation(
        observation.image[keep], observation.prompt[keep], observation.episode[keep], observation.step[keep],
        observation.seed[keep],
    )  # fmt: skip


def load(name, lab=WIDOWX, batch=2, **fields):
    return adapter.load("p", sections.Policy(adapter=name, **fields), None, lab, 0, batch)


@pytest.fixture
def install(monkeypatch):
    """Puts stand-in modules where imports find them."""

    def put(**modules):
        for name, content in modules.items():
            name = name.replace("__", ".")
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)

    put(torchvision={})
    return put


# ---- OpenVLA and SpatialVLA -----------------------------------------------------------------------------------------


def transformers(seen, version, **known):
    """`transformers` whose processor and model note their arguments in `seen`; the model answers ANSWER."""

    class Loaded:
        norm_stats = statistics = known
        config = SimpleNamespace(_commit_hash="abc")

        def to(self, device):
            return self

        def eval(self):
            return self

        def predict_action(self, *inputs, **settings):
            seen.append(settings)
            return torch.tensor(ANSWER) if settings else "tokens"

        def __call__(self, *given, **settings):
            seen.append((given, settings))
            return Inputs(settings)

        def decode_actions(self, tokens, unnorm_key):
            seen.append((tokens, unnorm_key))
            return {"actions": np.stack([ANSWER, ANSWER / 2, ANSWER / 4, ANSWER / 8])}

    class Inputs(dict):
        def to(self, device, dtype):
            return {"pixel_values": dtype}

    def from_pretrained(where, **settings):
        seen.append((where, settings))
        return Loaded()

    auto = SimpleNamespace(from_pretrained=from_pretrained)
    return {"__version__": version, "AutoProcessor": auto, "AutoModelForVision2Seq": auto, "AutoModel": auto}


def test_openvla_sees_words_and_pixels_as_in_its_own_evaluation(install):
    seen = []
    install(transformers=transformers(seen, "4.40.1", bridge_orig=LIMITS, fractal20220817_data=LIMITS))
    policy, given = load("openvla", revision="cafe", offline=True), observe(2)
    assert policy.metadata.execution == "all" and policy.metadata.chunk == 1 and policy.metadata.control_rate == 5
    reply = policy.act(given)
    np.testing.assert_allclose(reply["actions"], np.tile(ANSWER, (2, 1, 1)), rtol=1e-6)
    (_, first), (where, second), ((words, picture), _), predicted = seen[:4]
    assert where == "openvla/openvla-7b" and second["torch_dtype"] is torch.bfloat16 and second["trust_remote_code"]
    assert first["revision"] == "cafe" and first["local_files_only"]
    assert words == "In: What action should the robot take to put the carrot on the plate?\nOut:"
    assert np.array_equal(np.asarray(picture), images.lanczos(images.jpeg(given.image[0]), 224))
    assert predicted == {"pixel_values": torch.bfloat16, "unnorm_key": "bridge_orig", "do_sample": False}


def test_openvla_v01_speaks_vicuna():
    assert openvla.prompt("Lift It", "/data/run_v01/openvla-7b").startswith("In: What action")
    assert openvla.prompt("Lift It", "openvla/openvla-v01-7b") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. USER: What action should the robot take to lift it? ASSISTANT:"
    )


def test_openvla_refuses_the_transformers_that_hide_the_image(install):
    install(transformers=transformers([], "4.50.0", bridge_orig=LIMITS))
    with pytest.raises(UserError, match=r"transformers 4.50.0 makes OpenVLA ignore the image; install 4.40.1"):
        load("openvla")


def test_a_gripper_beyond_what_was_trained_on_is_an_opening():
    said = np.array([[0, 0, 0, 0, 0, 0, gripper] for gripper in (-0.4, 0.3, 1.2)])
    assert pretrained.metric(said, "widowx", 1.25)[:, 6].tolist() == [0, np.float32(0.3), 1]


def test_a_state_that_nobody_looks_at_is_refused(install):
    install(transformers=transformers([], "4.40.1", bridge_orig=LIMITS))
    with pytest.raises(UserError, match=r"policies\.p\.foreign\.state: this policy takes no state of the robot"):
        load("openvla", foreign=sections.Foreign(state="observation.state"))


def test_statistics_must_be_unambiguous(install):
    install(transformers=transformers([], "4.40.1", bridge_a=LIMITS, bridge_b=LIMITS))
    with pytest.raises(UserError, match="`statistics` must say which fit widowx; known: bridge_a, bridge_b"):
        load("openvla")
    assert load("openvla", statistics="bridge_b").metadata.extra["q99"][0] == 0.03
    with pytest.raises(UserError, match="statistics: 'bridge_c' is unknown"):
        load("openvla", statistics="bridge_c")
    with pytest.raises(UserError, match=r"checkpoint '/nowhere' is no folder here"):
        load("openvla", checkpoint="/nowhere")


def test_units_of_the_data_set_and_gain(install):
    install(transformers=transformers([], "4.40.1", libero_10=LIMITS))
    plain = load("openvla", LIBERO).act(observe(1))["actions"][0, 0]
    np.testing.assert_allclose(plain, [0.0005, -0.001, 0.0015, 0.05, 0.1, -0.15, 0.7], rtol=1e-6)
    more = load("openvla", LIBERO, options={"commanded_gain": 1.25}).act(observe(1))["actions"][0, 0]
    np.testing.assert_allclose(more[:6], 1.25 * plain[:6], rtol=1e-6)
    assert more[6] == plain[6]


def test_revision_tells_what_is_served(install):
    install(transformers=transformers([], "4.40.1", bridge_orig=LIMITS))
    policies = [{}, {"revision": "r"}, {"dtype": "fp32"}, {"options": {"commanded_gain": 1.2}}, {"checkpoint": "o/v01"}]
    served = [load("openvla", **fields).metadata.revision for fields in policies]
    assert len({one for one in served if one}) == 4  # the hub's commit counts, not the name of it
    assert served[0] == served[1]


def test_spatialvla_gets_the_bare_instruction_and_ensembles(install):
    seen = []
    install(transformers=transformers(seen, "4.47.0", **{"bridge_orig/1.0.0": LIMITS}))
    policy, given = load("spatialvla"), observe(1)
    assert (policy.metadata.execution, policy.metadata.ensemble, policy.metadata.chunk) == ("ensemble", -0.8, 4)
    assert load("spatialvla", execution="first").metadata.execution == "first"
    seen.clear()
    reply = policy.act(given)["actions"]
    assert reply.shape == (1, 4, 7)
    np.testing.assert_allclose(reply[0, 1], ANSWER / 2, rtol=1e-6)
    (_, asked), _, decoded = seen
    assert asked["text"] == "put the carrot on the plate" and asked["do_normalize"] is False
    assert asked["unnorm_key"] == "bridge_orig/1.0.0" and decoded == ("tokens", "bridge_orig/1.0.0")
    assert np.array_equal(np.asarray(asked["images"][0]), images.area(given.image[0], 224))


# ---- Octo -----------------------------------------------------------------------------------------------------------


def tree_map(function, *trees):
    if isinstance(trees[0], (dict, tuple)):
        parts = trees[0] if isinstance(trees[0], dict) else range(len(trees[0]))
        mapped = {part: tree_map(function, *(tree[part] for tree in trees)) for part in parts}
        return mapped if isinstance(trees[0], dict) else tuple(mapped.values())
    return function(*trees)


def vmap(function, in_axes):
    def mapped(model, *arguments):
        assert in_axes == (None, 0, 0, 0)
        rows = range(len(arguments[-1]))
        return np.stack([function(model, *tree_map(lambda leaf, row=row: leaf[row], arguments)) for row in rows])

    return mapped


JAX = {
    "jit": lambda function: function, "vmap": vmap, "tree_util": SimpleNamespace(tree_map=tree_map),
    "random": SimpleNamespace(PRNGKey=lambda seed: seed),
}  # fmt: skip


class OctoModel:
    """Answers 4 actions: the mean of the window's last image, the number of real images, and the key's low bits."""

    dataset_statistics = {"bridge_dataset": {"action": {"mean": np.zeros(7), "p01": np.zeros(7), "p99": np.ones(7)}}}  # noqa: RUF012

    @classmethod
    def load_pretrained(cls, where):
        cls.where = where
        return cls()

    def create_tasks(self, texts):
        self.texts = texts
        return {"language_instruction": {"input_ids": np.arange(len(texts))[:, None]}}

    def sample_actions(self, observations, tasks, unnormalization_statistics, rng):
        assert unnormalization_statistics is self.dataset_statistics["bridge_dataset"]["action"]
        assert observations["image_primary"].shape == (1, 2, 256, 256, 3) and rng.dtype == np.uint32
        self.window = observations["image_primary"][0]
        row = [self.window[1].mean(), observations["timestep_pad_mask"].sum(), *rng % 1000, 0, 0, 0.9]
        return np.tile(np.float32(row), (1, 4, 1))


@pytest.fixture
def octo(install, tmp_path):
    fetched = []

    def snapshot_download(name, **source):
        fetched.append((name, source))
        return str(tmp_path)

    install(
        jax=JAX, octo={}, octo__model={}, octo__model__octo_model={"OctoModel": OctoModel},
        huggingface_hub={"snapshot_download": snapshot_download},
    )  # fmt: skip
    policy = load("octo", checkpoint="hf://rail-berkeley/octo-small-1.5", revision="cafe")
    assert fetched == [("rail-berkeley/octo-small-1.5", {"revision": "cafe", "local_files_only": False})]
    assert OctoModel.where == str(tmp_path)
    return policy


def test_octo_takes_the_statistics_of_one_data_set_as_they_are(octo, monkeypatch, tmp_path):
    monkeypatch.setattr(OctoModel, "dataset_statistics", {"action": {"mean": np.ones(7)}, "num_transitions": 9})
    assert load("octo", checkpoint=str(tmp_path))._statistics is OctoModel.dataset_statistics["action"]


def test_octo_sees_two_images_and_draws_anew_at_every_step(octo):
    assert (octo.metadata.chunk, octo.metadata.history, octo.metadata.execution, octo.metadata.ensemble) == (
        4,
        2,
        "ensemble",
        0,
    )
    first, second = observe(3, 0, 128), observe(3, 1, 128)
    answers = [octo.act(given)["actions"] for given in (first, second)]
    assert octo._model.texts == second.prompt and answers[0].shape == (3, 4, 7)
    assert [answer[0, 0, 1] for answer in answers] == [1, 2]  # the mask
    drawn = np.concatenate([answer[:, 0, 2:4] for answer in answers])
    assert len(np.unique(drawn, axis=0)) == 6  # another key for every row and step
    assert np.array_equal(octo.act(first)["actions"], answers[0])


def test_octo_repeats_the_first_image_and_keeps_episodes_apart(octo):
    together = [octo.act(observe(3, step))["actions"] for step in (0, 1)]
    newest = images.lanczos(observe(3, 1).image[2], 256)
    octo.act(row_of(observe(3, 0), 2))
    assert np.array_equal(octo._model.window[0], octo._model.window[1])
    alone = octo.act(row_of(observe(3, 1), 2))["actions"]
    assert np.array_equal(octo._model.window[1], newest) and not np.array_equal(octo._model.window[0], newest)
    assert np.array_equal(alone[0], together[1][2])


# ---- RT-1-X ---------------------------------------------------------------------------------------------------------


class RT1:
    """Most likely tokens: the number of images that are not zeros, then 255 everywhere; `tokens` may say otherwise."""

    tokens = None
    shape = None

    def __init__(self, **shape):
        RT1.shape = shape

    def apply(self, variables, seen, act, act_tokens, train, rngs):
        assert variables == {"params": 1, "batch_stats": 2} and train is False and act is None
        RT1.image, RT1.words = seen["image"], seen["natural_language_embedding"]
        rows = len(RT1.image)
        logits = np.zeros((rows, 15, 92, 512), np.float32)
        for token, value in enumerate(self.tokens):
            logits[:, -1, 80 + token, value] = 1  # an action token is foretold one place before its own
        return logits.reshape(rows, 15 * 92, 512)


def detokenize(tokens, vocabulary, reach):
    def between(columns, low, high):
        return tokens[:, columns] / (vocabulary - 1) * (high - low) + low

    return {
        "terminate_episode": np.eye(3)[tokens[:, 0]], "world_vector": between(slice(1, 4), *reach),
        "rotation_delta": between(slice(4, 7), -np.pi / 2, np.pi / 2),
        "gripper_closedness_action": between(slice(7, 8), -1, 1),
        "base_displacement_vertical_rotation": between(slice(8, 9), -np.pi, np.pi),
        "base_displacement_vector": between(slice(9, 11), -1, 1),
    }  # fmt: skip


@pytest.fixture
def rt1(install, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    checkpoints = SimpleNamespace(restore_checkpoint=lambda where, target: {"params": 1, "batch_stats": 2, "step": 3})
    install(
        jax=JAX, flax={}, flax__training={"checkpoints": checkpoints},
        rt1={"RT1": RT1, "detokenize_action": detokenize},
    )  # fmt: skip
    (tmp_path / "rt1.py").write_text("# stands for the clone's folder")
    np.savez(tmp_path / "embeddings.npz", **{"lift": np.full(512, 0.5, np.float32)})
    files = {"code": str(tmp_path), "embeddings": str(tmp_path / "embeddings.npz")}
    return lambda lab=WIDOWX: load("rt1x", lab, checkpoint=str(tmp_path), files=files)


def test_rt1x_on_bridge_is_in_world_model_units(rt1):
    # 0.875 of the range of ±2 is 1.5, and beyond 1.75 is out of reach; 511 of 511 is π/2, beyond 1.4.
    RT1.tokens = [1, 447, 255, 511, 511, 255, 0, 511, 255, 255, 255]
    policy = rt1()
    assert RT1.shape["world_vector_range"] == (-2.0, 2.0) and RT1.shape["num_image_tokens"] == 81
    reply = policy.act(observe(1, prompt="lift"))
    assert set(reply) == {"actions", "terminate"} and not reply["terminate"].any()
    expected = [
        (447 / 511 * 4 - 2) / 35,
        (255 / 511 * 4 - 2) / 35,
        0.05,
        0.25,
        (255 / 511 - 0.5) * np.pi / 5.6,
        -0.25,
        0,
    ]
    np.testing.assert_allclose(reply["actions"][0, 0], expected, rtol=1e-5)


def test_rt1x_history_is_zeros_before_the_first_image(rt1):
    RT1.tokens = [0] + [255] * 10
    policy = rt1()
    for step in range(17):
        assert policy.act(observe(1, step, prompt="lift"))["terminate"].all()
        real = min(step + 1, 15)
        assert not RT1.image[0, : 15 - real].any() and not RT1.words[0, : 15 - real].any()
        assert (RT1.words[0, 15 - real :] == 0.5).all()
    np.testing.assert_allclose(RT1.image[0, -1], images.bilinear(observe(1, 16).image[0], 300) / 255)
    np.testing.assert_allclose(RT1.image[0, 0], images.bilinear(observe(1, 2).image[0], 300) / 255)


def test_rt1x_on_the_google_robot_drives_and_its_gripper_keeps_what_is_not_changed(rt1):
    policy, openings = rt1(GOOGLE), []
    for step, gripper in enumerate([255, 511, 255, 0, 255]):  # hold, close, hold, open, hold
        RT1.tokens = [1, 511, 255, 255, 255, 255, 255, gripper, 511, 0, 511]
        reply = policy.act(observe(1, step, prompt="lift"))
        openings.append(reply["actions"][0, 0, 6])
    assert openings == [1, 0, 0, 1, 1]
    assert reply["actions"][0, 0, 0] == pytest.approx(2.0)
    assert reply["base"][0, 0].tolist() == pytest.approx([-1, 1, np.pi])


def test_rt1x_says_what_is_missing(rt1, monkeypatch):
    with pytest.raises(UserError, match=r"files.code: '/nowhere' holds no rt1.py"):
        load("rt1x", files={"code": "/nowhere"})
    monkeypatch.setitem(sys.modules, "tensorflow_hub", None)
    with pytest.raises(WireError, match=r"'push' is not among files\.embeddings and tensorflow_hub is not installed"):
        rt1().act(observe(1, prompt="push"))
    with pytest.raises(UserError, match="dtype bf16 is not available"):
        load("rt1x", dtype="bf16")
    assert rt1x.ENCODER.endswith("universal-sentence-encoder-large/5")
