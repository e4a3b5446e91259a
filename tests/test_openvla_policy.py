"""OpenVLA's adapter with the transformers that it is pinned to, in an environment of its own: a small vision-language model,
whose code comes with the checkpoint as OpenVLA's does, is loaded, examined and rolled out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from envs.build import interpreter
from tests.chain import ROOT
from tests.test_rollouts import SIZE, FakeWorld
from workflow_src.policies import client, openvla
from workflow_src.rollouts.loop import roll_out
from workflow_src.rollouts.run import shard_of
from workflow_src.rollouts.trials import Trial

pytestmark = pytest.mark.requires("openvla")
PROMPTS = ["Lift the carrot", "close the drawer"]
PICTURES = np.stack([np.full((SIZE, SIZE, 3), value, np.uint8) for value in (0, 255)])

# What a checkpoint on the hub brings along: a Llama that is shown the image's patches before the words, and answers each of
# seven numbers by one of its last 256 tokens.
CODE = """
    import numpy as np
    import torch
    from torchvision.transforms.functional import to_tensor
    from transformers import BatchFeature, LlamaConfig, LlamaForCausalLM, ProcessorMixin
    from transformers.image_processing_utils import ImageProcessingMixin

    class SmallConfig(LlamaConfig):
        model_type = "small_vla"

        def __init__(self, norm_stats=None, **fields):
            super().__init__(**fields)
            self.norm_stats = norm_stats

    class SmallImages(ImageProcessingMixin):
        def __call__(self, image):
            assert image.size == (224, 224)
            return to_tensor(image)[None] * 2 - 1

    class SmallProcessor(ProcessorMixin):
        attributes = ["image_processor", "tokenizer"]
        image_processor_class, tokenizer_class = "AutoImageProcessor", "AutoTokenizer"

        def __call__(self, text, image):
            words = self.tokenizer(text, return_tensors="pt")
            return BatchFeature({**words, "pixel_values": self.image_processor(image)})

    class SmallVLA(LlamaForCausalLM):
        config_class = SmallConfig

        def __init__(self, config):
            super().__init__(config)
            self.eye, self.norm_stats = torch.nn.Conv2d(3, config.hidden_size, 56, 56), config.norm_stats
            self.post_init()

        def forward(self, input_ids=None, pixel_values=None, past_key_values=None, **settings):
            heard = self.get_input_embeddings()(input_ids)
            if past_key_values is None:
                heard = torch.cat([self.eye(pixel_values).flatten(2).transpose(1, 2), heard], 1)
            return super().forward(inputs_embeds=heard, past_key_values=past_key_values, use_cache=True)

        def prepare_inputs_for_generation(
            self, input_ids, past_key_values=None, pixel_values=None, attention_mask=None, **settings
        ):
            new = input_ids if past_key_values is None else input_ids[:, -1:]
            return {"input_ids": new, "pixel_values": pixel_values, "past_key_values": past_key_values}

        def predict_action(self, input_ids=None, unnorm_key=None, **settings):
            limits = self.norm_stats[unnorm_key]["action"]
            low, high = (np.array(limits[name]) for name in ("q01", "q99"))
            said = self.generate(input_ids, max_new_tokens=len(low), **settings)[0, -len(low):].numpy()
            return low + (self.config.vocab_size - 1 - said) / 255 * (high - low)
"""
# Writes the checkpoint, and what it says of a black and a white picture without the adapter.
MAKE = """
    import json, sys
    from pathlib import Path
    from workflow_src.policies.pretrained import import_torch
    torch = import_torch()
    import numpy as np
    from PIL import Image
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder, prompts = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.path.insert(0, str(folder))
    import small
    letters = {letter: number for number, letter in enumerate(["<s>", "</s>", *map(chr, range(32, 127)), "\\n"])}
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])), bos_token="<s>", eos_token="</s>",
                                    model_input_names=["input_ids", "attention_mask"])
    words.save_pretrained(folder)
    auto = {"AutoProcessor": "small.SmallProcessor", "AutoImageProcessor": "small.SmallImages"}
    preprocessor = {"image_processor_type": "SmallImages", "processor_class": "SmallProcessor", "auto_map": auto}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    limits = {"action": {"q01": [-0.03] * 3 + [-0.1] * 3 + [-0.5], "q99": [0.03] * 3 + [0.1] * 3 + [1.5]}}
    config = small.SmallConfig(
        norm_stats={"bridge_orig": limits, "fractal20220817_data": limits}, vocab_size=400, hidden_size=32,
        intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
        auto_map={"AutoConfig": "small.SmallConfig", "AutoModelForVision2Seq": "small.SmallVLA"},
    )
    torch.manual_seed(0)
    model = small.SmallVLA(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight[:-256].data)  # only actions are ever said
    model.to(torch.bfloat16).save_pretrained(folder)

    answers = []
    for prompt in prompts:
        for value in (0, 255):
            image = Image.new("RGB", (224, 224), (value,) * 3)
            seen = small.SmallProcessor(small.SmallImages(), words)(prompt, image).to("cpu", dtype=torch.bfloat16)
            answers.append(model.predict_action(**seen, unnorm_key="bridge_orig", do_sample=False))
    np.save(folder / "answers.npy", answers)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Endpoint file of the served checkpoint, its stage file, and the answers (prompts, black and white, 7) it must give."""
    folder = tmp_path_factory.mktemp("openvla")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "small.py").write_text(textwrap.dedent(CODE))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hub")}
    prompts = json.dumps([openvla.prompt(prompt, "openvla") for prompt in PROMPTS])
    made = [interpreter("openvla"), "-c", textwrap.dedent(MAKE), str(checkpoint), prompts]
    done = subprocess.run(made, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    policy = {"adapter": "openvla", "checkpoint": str(checkpoint), "offline": True}
    lab = {"image_size": SIZE, "scene": "none", "tasks": [], "embodiment": "widowx"}
    stage, endpoint = folder / "stage.json", folder / "endpoint.json"
    stage.write_text(json.dumps({"seed": 0, "lab": lab, "policies": {"p": policy}, "rollouts": {"batch": 2}}))
    command = [interpreter("openvla"), "-m", "workflow_src.policies.serve", "--config", stage, "--policy", "p",
               "--endpoint-file", endpoint, "--log", folder / "log"]  # fmt: skip
    server = subprocess.Popen(list(map(str, command)), env=environment)
    yield endpoint, stage, np.load(checkpoint / "answers.npy").reshape(2, 2, 7)
    server.terminate()
    server.wait(20)


def test_the_adapter_says_what_the_checkpoint_says(served):
    endpoint, _, answers = served
    with client.connect(endpoint, 120) as policy:
        assert policy.metadata.extra["q01"][6] == -0.5 and policy.metadata.control_rate == 5
        number = np.zeros(2, np.int64)
        for prompt, expected in zip(PROMPTS, answers):
            asked = {"image": PICTURES, "prompt": [prompt] * 2, "episode": number, "step": number, "seed": number}
            said = policy.infer(asked)["actions"][:, 0]
            np.testing.assert_allclose(said[:, :6], expected[:, :6], rtol=1e-5)
            np.testing.assert_allclose(said[:, 6], expected[:, 6].clip(0, 1), rtol=1e-5)  # an opening
    assert len(np.unique(answers.reshape(4, 7), axis=0)) == 4  # image and words decide


def test_the_doctor_passes_it(served):
    endpoint, stage, _ = served
    command = [sys.executable, "-m", "workflow_src.policies.doctor", "p", "--config", stage, "--endpoint", endpoint]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = {line[:18].strip(): line[18:30].strip() for line in done.stdout.splitlines()}
    assert outcomes["image"] == outcomes["instruction"] == outcomes["range of actions"] == "passed"


def test_it_is_rolled_out(served):
    endpoint, _, answers = served
    trials = [Trial(f"lift/{i}", "lift", PROMPTS[0], PICTURES[i], None, i) for i in range(2)]
    with client.connect(endpoint, 120) as policy:
        black, white = next(roll_out(FakeWorld(2), policy, shard_of(trials, 1, 0, 1), 3))
    np.testing.assert_allclose([black.actions[0, :6], white.actions[0, :6]], answers[0, :, :6], rtol=1e-5)
    assert black.actions.shape == (3, 7) and not np.array_equal(black.actions[1], black.actions[0])
