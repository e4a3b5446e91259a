"""The configuration model: one frozen dataclass per section of `config/*.yaml`.

Every field has a default, so `config/config.yaml` states only what it wants to differ or to show. `common/config.py` builds
these from YAML with one-line errors, and `config/schema.json` is generated from them. A comment beside a field gives its
unit, range or reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

MIX = {"expert": 0.22, "slow": 0.12, "noisy": 0.26, "failing": 0.12, "random": 0.06, "play": 0.1, "idle": 0.05,
       "pantomime": 0.07}  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """The place where truth comes from: any Gymnasium vector environment of DESIGN's API (default: the MuJoCo tabletop)."""

    env_id: str = "workflow_src.tabletop.env:Tabletop-v0"
    # `none`: the robot is not at hand. Trials come from `trials.root`, and truth, if at all, from `reality`.
    scene: Literal["one_block", "two_blocks", "none"] = "one_block"
    tasks: tuple[str, ...] = ("put_on_plate", "lift", "push_left")  # without a lab, empty: the folders of `trials.root`
    image_size: int = 48  # pixels, square
    supersample: int = 2  # rays per pixel side
    horizon: int = 18  # environment steps of every episode and rollout
    workers: int = 2  # simulation processes
    embodiment: str = "tabletop"


@dataclass(frozen=True)
class Split:
    """How many episodes of which behaviour one split of the data set holds."""

    episodes: int = 100
    mix: dict[str, float] = field(default_factory=lambda: dict(MIX))  # share of each behaviour


@dataclass(frozen=True)
class Recorded:
    """Registered data sets (`config/datasets.yaml`): fetched and converted where `world_model.data` names them."""

    registry: str = ""  # file of more of them, like that one
    copies: dict[str, str] = field(default_factory=dict)  # name → folder of a copy that is here: nothing is fetched
    groups: int = 8  # jobs that convert one data set
    stream: bool = False  # convert from the network, shard by shard, and keep no copy of what the authors publish
    # RLDS is read without TensorFlow. With it instead: `tfds` (envs/tfds.yaml), or the path of a Python interpreter.
    tensorflow: str = ""
    max_rejected: float = 0.02  # share of damaged episodes that is tolerated


@dataclass(frozen=True)
class Episodes:
    """Recorded robot data."""

    dataset: str = "tabletop"  # name of the data set that the lab records
    # Name → folder of other data sets, with a folder per split: train, and validation, val or test. Or its address in a
    # bucket (s3://…), from which train and validation are fetched.
    stores: dict[str, str] = field(default_factory=dict)
    recorded: Recorded = field(default_factory=Recorded)
    splits: dict[str, Split] = field(default_factory=lambda: {
        "train": Split(episodes=800), "validation": Split(episodes=64), "judge": Split(episodes=200),
    })  # fmt: skip


# Fields of `Training` that say how it is done and not what comes out, rounding aside: its checkpoints outlive their change.
MANNER = ("validate_every", "activation_checkpointing", "compile", "shard")


@dataclass(frozen=True)
class Training:
    """One optimisation run. All loops share the engine in `training/engine.py`, so all share these fields."""

    steps: int = 1000
    batch: int = 96  # global batch: the same whatever the number of processes
    micro_batch: int = 0  # samples per forward and process; 0: as large as the share of the global batch
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices by Muon, everything else by AdamW
    lr: float = 2e-3  # AdamW
    muon_lr: float = 0.02
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 50  # steps
    decay: float = 0.4  # last fraction of the steps, in which the learning rate falls to zero; 0: constant
    decay_shape: Literal["linear", "cosine"] = "linear"
    clip: float = 1.0  # gradient norm
    ema: float = 0.995
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast where the processor has it
    checkpoint_every: int = 250  # steps
    keep: int = 2  # checkpoints kept
    recipe: int = 1  # raise on purpose when the training code changed and old artefacts should be made anew
    validate_every: int = 0  # steps between validations of a world model in training; 0: once, at the end
    activation_checkpointing: bool = False  # compute the blocks' activations again in the backward pass: saves memory
    compile: bool = False  # torch.compile of the network's blocks
    shard: bool = False  # weights, gradients and AdamW's state split over the processes (FSDP2): models beyond one GPU


@dataclass(frozen=True)
class Tokenizer:
    """The convolutional autoencoder of the tabletop (`kind: conv`), or a frozen Stable Diffusion 3 VAE (`kind: sd3`)."""

    kind: Literal["conv", "sd3"] = "conv"
    source: str = ""  # sd3: hub repository (owner/name, its folder vae/), or folder of diffusers' AutoencoderKL
    revision: str = ""  # sd3: commit of that repository
    channels: int = 16  # conv, like all that follow
    downsample: int = 8
    width: int = 32
    training: Training = field(default_factory=lambda: Training(steps=1200, batch=32, decay=0.4))


@dataclass(frozen=True)
class Network:
    """Options of the one network class, `world_model/network.py`. Defaults are the paper's (607.93 M parameters)."""

    in_channels: int = 16
    patch: int = 2
    width: int = 1024
    depth: int = 16
    heads: int = 16
    mlp_ratio: float = 4.0
    activation: Literal["gelu", "relu2"] = "gelu"  # of the MLPs; squared ReLU is several times cheaper on a CPU
    action_dim: int = 10
    attention: Literal["factorised", "joint"] = "factorised"  # spatial then causal temporal, or joint block-causal
    spatial_rope: Literal["standard", "pixel", "none"] = "standard"
    temporal: Literal["rope", "relative_bias"] = "rope"
    previous_frame: bool = False  # previous frame's patches concatenated to the input, gated skip to the output
    action_mlp: bool = False  # two-layer action embedding instead of one linear layer
    learned_null: bool = False  # learned "episode start" and "dropped for guidance" embeddings
    first_frame: bool = False  # the episode's first frame stays in view beyond the window


@dataclass(frozen=True)
class Objective:
    """What the network predicts, and at which noise levels it is trained (Diffusion Forcing: one level per frame)."""

    schedule: Literal["sigmoid", "flow"] = "sigmoid"  # discrete VP schedule with 1000 steps, or rectified flow
    prediction: Literal["v", "x0", "flow"] = "v"
    context_probability: float = 0.0  # share of frames trained as lightly noised context
    context_pattern: Literal["independent", "alternating"] = "independent"  # alternating: neighbours tend to differ
    context_noise: float = 0.12  # largest noise level of such frames (flow schedule)
    noise_shift: float = 1.0  # t = s u / (1 + (s - 1) u): above 1 trains more at high noise (flow schedule)
    action_dropout: float = 0.0  # share of clips whose actions are dropped, for guidance


@dataclass(frozen=True)
class Sampler:
    """How frames are generated."""

    steps: int = 10
    context_noise: float = 15 / 1000  # level at which context frames are shown, a fraction of full noise
    window: int = 20  # frames in view, the new ones included
    horizon: int = 1  # frames generated at once (pyramid schedule)
    guidance: float = 1.0  # classifier-free guidance over actions; 1: off
    mode: Literal["exact", "streaming"] = "exact"
    cached: bool = True  # False: naive full-window recomputation, the tested reference
    compile: bool = False  # torch.compile with static shapes, on a GPU as CUDA graphs; takes minutes to start


@dataclass(frozen=True)
class OwnFrames:
    """Training on the model's own rollouts as context, against drift."""

    share: float = 0.0  # share of the clips that show own frames; 0: off
    begin: float = 0.5  # fraction of the training without them
    every: int = 300  # steps between refreshes of the rollouts
    horizon: int = 8  # steps of a rollout


@dataclass(frozen=True)
class Published:
    """A published checkpoint in WorldGym's layout, which is imported instead of training a world model."""

    checkpoint: str = ""  # a file, or http(s)://…, hf://owner/name@commit/path, a Google Drive link; empty: train
    sha256: str = ""  # of the file; empty: whatever comes, and its sha256 is reported


@dataclass(frozen=True)
class WorldModel:
    """The action-conditioned video model."""

    source: Published = field(default_factory=Published)
    network: Network = field(default_factory=Network)
    objective: Objective = field(default_factory=Objective)
    sampler: Sampler = field(default_factory=Sampler)
    convention: Literal["worldgym", "rehearsal"] = "rehearsal"  # action scaling, see `embodiments.py`
    alignment: Literal["leads_to", "worldgym_train"] = "leads_to"
    actions: Literal["commanded", "reached"] = "commanded"
    # Data sets to train on: "one,two" (each counts by the clips it holds) or {one: weight, two: weight}; "": the lab's.
    data: str | dict[str, float] = ""
    latents: Literal["cached", "on_the_fly"] = "cached"  # frames encoded once, to disk, or whenever they are trained on
    clip_frames: int = 6
    frame_skip: int | dict[str, int] = 1  # a clip shows every n-th frame; {name: n} by data set, 1 for the others
    contact_weight: float = 0.0  # how much more often clips are drawn in which an object moves all the time; 0: equally
    mirror: bool = True  # train on left-right mirrored clips as well
    own_frames: OwnFrames = field(default_factory=OwnFrames)
    training: Training = field(default_factory=lambda: Training(steps=1700, optimizer="muon"))
    processes: int = 1  # torchrun processes on a machine without GPU; with GPUs: one per granted GPU


@dataclass(frozen=True)
class BehaviourCloning:
    """One separately trained policy network; its snapshots by step count are policies of graded quality."""

    snapshots: tuple[int, ...] = (250, 300, 350, 450, 800)
    data_fraction: float = 1.0  # share of the training episodes this network sees
    width: int = 32
    keypoints: int = 32
    mirror: bool = False
    training: Training = field(default_factory=lambda: Training(steps=800, batch=128, lr=3e-3))


@dataclass(frozen=True)
class Foreign:
    """How a foreign server of openpi's protocol is spoken to. Of a checkpoint for a server of ours: its state alone."""

    cameras: tuple[str, ...] = ()  # keys of the images it wants; a rollout shows one
    image_size: int = 0  # pixels, square, bilinear with black bars as openpi's client resizes; 0: as it is
    prompt: str = "prompt"  # key of the instruction
    state: str = ""  # key of the robot's state, reckoned from a trial's `initial_state`; empty: it wants none
    # Of x, y, z (m), roll, pitch, yaw (rad), opening, closedness (0 to 1), zero.
    state_layout: tuple[str, ...] = ("x", "y", "z", "roll", "pitch", "yaw", "opening")
    actions: Literal["delta", "absolute", "joint"] = "delta"  # displacement per step, or pose; joints are refused
    layout: tuple[str, ...] = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")  # of an action; "_" is not looked at
    translation_unit: float = 1.0  # metres that a 1 stands for
    rotation_unit: float = 1.0  # radians
    gripper_open: float = 1.0  # what it answers to open the gripper
    gripper_closed: float = 0.0
    control_rate: float = 0.0  # Hz that it was trained at
    execution: Literal["all", "first"] = "all"  # of a chunk of actions
    sampling: bool = False  # it draws noise, which nobody can seed


@dataclass(frozen=True)
class Policy:
    """One policy to rank."""

    adapter: str = "tabletop_bc"  # module of `workflow_src/policies/` that serves it
    network: str = ""  # name of a behaviour-cloning run, for adapters that need one
    snapshot: int = 0  # training step of that run
    options: dict[str, float] = field(default_factory=dict)  # adapter options: noise (m), gripper_flips, gain, ...
    # Of a published policy. Its `revision` is the commit of the hub repository.
    checkpoint: str = ""  # hub repository (owner/name) or folder; empty: the one the adapter is named after
    statistics: str = ""  # data set whose statistics un-normalise its actions; empty: that of the lab's embodiment
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"] = "auto"  # auto: as published
    device: str = ""  # torch's or JAX's name of it; empty: the GPU where there is one
    offline: bool = False  # load from disk alone
    execution: Literal["", "first", "all", "ensemble"] = ""  # what is done of a chunk of actions; empty: as published
    files: dict[str, str] = field(default_factory=dict)  # further files of an adapter: name → path
    # Conda environment: envs/<env>.yaml; conda:<name> of one that exists; its folder; or path of a Python interpreter.
    env: str = "tabletop"
    endpoint: str = ""  # ws://host:port of a server that is already running, instead of adapter and env
    # What that server calls things, and in which units it answers; of a checkpoint that wants the robot's state: its numbers.
    foreign: Foreign = field(default_factory=Foreign)
    revision: str = ""  # what that server serves, required with `endpoint`; of a checkpoint: see above
    token_env: str = ""  # environment variable that holds its token
    allow_plaintext: bool = False  # permit ws:// to another machine


@dataclass(frozen=True)
class Trials:
    """The first frames and instructions every policy is tried on, in both worlds; drawn from the lab unless said otherwise."""

    per_task: int = 34  # drawn from the lab, or from `store`
    root: str = ""  # folder of <task>/<name>.png (or .jpg) + .json; of a suite's tasks the pictures alone
    suites: tuple[str, ...] = ()  # names in config/trials, or paths of such files: tasks with instruction and rubric
    # Folder of episodes, with `episodes.parquet`: first frames of each task; with suites, stand-ins for frames that they lack.
    store: str = ""
    # How a picture gets the world model's size: `stretch` distorts, as the converters of BridgeData V2 do.
    fit: Literal["as_is", "letterbox", "crop", "stretch"] = "as_is"


@dataclass(frozen=True)
class Rollouts:
    """The closed loop."""

    repeats: int = 1  # rollouts per trial; in the world model with other noise
    shards: int = 1  # jobs per policy; changes no result
    batch: int = 51  # trials side by side, one shape for world model and policy: short batches are padded
    server_deadline: int = 900  # seconds a policy server may take to load
    step_timeout: int = 120  # seconds a policy may take for one answer


@dataclass(frozen=True)
class Vlm:
    """A judge: a vision-language model behind any server that speaks OpenAI's chat completions."""

    model: str = ""  # as the server names it
    base_url: str = "https://api.openai.com/v1"  # vLLM …:8000/v1, Ollama …:11434/v1, llama.cpp …:8080/v1, …
    key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; a server on loopback may have none
    allow_plaintext: bool = False  # permit http:// to another machine
    prompt: str = "success_1"  # config/prompts/<prompt>.yaml
    worlds: tuple[Literal["lab", "world_model"], ...] = ("lab", "world_model")  # whose rollouts it judges
    frames: int = 6  # evenly spaced between the first and the last frame, which are always shown
    side: int = 256  # pixels of a frame's longer side as sent; 0: as stored
    detail: Literal["", "low", "high", "auto"] = ""  # of the images; sent only when given
    votes: int = 3  # independent requests per rollout
    parameters: dict[str, float] = field(default_factory=dict)  # temperature, seed (+ vote), …: sent only when given
    structured: bool = True  # ask for JSON by schema; false for servers that refuse `response_format`
    mode: Literal["requests", "batch"] = "requests"  # batch: the provider's Batch API, cheaper, up to a day
    concurrency: int = 8  # requests under way at once
    retries: int = 6  # after rate limits, server errors and timeouts
    timeout: int = 120  # seconds without a sign of life from the server
    price_input: float = 0.0  # per million tokens
    price_output: float = 0.0  # per million tokens
    image_tokens: int = 300  # per image; for estimates only
    answer_tokens: int = 200  # per answer; for estimates only
    spend_limit: float = 0.0  # over all runs, in the prices' currency; 0: none


@dataclass(frozen=True)
class Human:
    """The judge `human`: labels that people gave."""

    labels: tuple[str, ...] = ()  # CSV files, one per labeller or more
    sample: str = ""  # sample.csv of the labelling page they come from; empty: the CSVs name rollouts themselves


@dataclass(frozen=True)
class Judges:
    """Success from video."""

    primary: str = "classifier"  # which judge fills `success_imagined`: classifier, state, human, or a name under `vlm`
    batch: int = 64
    width: int = 32
    latent_noise: float = 0.15  # judge training sees tokenizer reconstructions of latents with this noise
    training: Training = field(default_factory=lambda: Training(steps=700, batch=96, lr=1e-3))
    vlm: dict[str, Vlm] = field(default_factory=dict)  # further judges, by name
    human: Human = field(default_factory=Human)
    probes: int = 60  # lab rollouts from which each judge's clipped, swapped, reversed and shuffled clips are made


@dataclass(frozen=True)
class Analysis:
    """Agreement statistics."""

    confidence: float = 0.95
    resamples: int = 2000
    # Lab trials per task that the prediction-powered estimate may use; the others are imagined alone.
    real_trials: int = 10


@dataclass(frozen=True)
class Gpus:
    """GPUs that one job of a kind asks for, all of one machine. They change no result; on one without GPUs none are used."""

    tokenizer: int = 0
    latents: int = 0
    world_model: int = 0  # of its training: a process each
    behaviour_cloning: int = 0
    judges: int = 0
    # Of a policy's server and its rollouts: 1 is shared; of several the world model gets the last, the policy the others.
    rollouts: int | dict[str, int] = 0  # for all policies, or by name (1 for those that are not named)


@dataclass(frozen=True)
class Distributed:
    """How the processes of one training meet. Variables of the environment that are already set go before it."""

    timeout: int = 1800  # seconds after which a process that does not answer ends the job
    infiniband: bool = True  # NCCL uses InfiniBand where there is some
    debug: Literal["warnings", "info", "detail"] = "warnings"  # what NCCL and torch.distributed say about it


@dataclass(frozen=True)
class Publish:
    """The target `publish`: a copy of the results in a bucket."""

    to: str = ""  # s3://bucket/folder; empty: nowhere
    # Folders of the results. The gallery shows videos that lie in `rollouts`.
    parts: tuple[str, ...] = ("tables", "figures", "gallery", "notebooks", "rollouts", "judgements", "world_model")


@dataclass(frozen=True)
class Config:
    """Everything one run of the workflow depends on."""

    seed: int = 0  # every other seed derives from it
    results: str = "results"
    # Recorded data that the target `recorded_data` makes: a registered set, or all of world_model.data.
    dataset: str = "all"
    lab: Lab = field(default_factory=Lab)
    episodes: Episodes = field(default_factory=Episodes)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    world_model: WorldModel = field(default_factory=WorldModel)
    behaviour_cloning: dict[str, BehaviourCloning] = field(default_factory=dict)
    policies: dict[str, Policy] = field(default_factory=dict)
    trials: Trials = field(default_factory=Trials)
    rollouts: Rollouts = field(default_factory=Rollouts)
    judges: Judges = field(default_factory=Judges)
    analysis: Analysis = field(default_factory=Analysis)
    gpus: Gpus = field(default_factory=Gpus)
    distributed: Distributed = field(default_factory=Distributed)
    # Folder on a machine's own disk, e.g. $SLURM_TMPDIR or /scratch: a world model's training reads its data from a copy there.
    local_cache: str = ""
    # Environment → image that its jobs run in with `--sdm apptainer`: docker://registry/name:tag, or a .sif file that is here.
    images: dict[str, str] = field(default_factory=dict)
    publish: Publish = field(default_factory=Publish)
    reality: str = ""  # CSV of real results (policy, task, success, n, source); empty: the lab is reality
    reality_names: dict[str, str] = field(default_factory=dict)  # name in that CSV → policy or task here
