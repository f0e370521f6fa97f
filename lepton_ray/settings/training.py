"""The training branch of the settings tree: parallelism, optimisation, precision, initialisation, stopping, logging."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from lepton_ray.settings.node import Node

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Pattern = Annotated[str, Field(min_length=1, max_length=500)]
"""A parameter name pattern as in `fnmatch`: `encoder.*`, `*.bias`."""


class ParallelSettings(Node):
    """How the model is spread over the ranks."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: a whole model on each rank, gradients averaged. `fsdp`: weights, gradients and optimiser state cut over
    the ranks (FSDP2, `torch.distributed.fsdp.fully_shard`), for models beyond one GPU."""
    bucket_mb: Annotated[float, Field(gt=0.0, le=4096.0)] = 25.0
    """Megabytes of gradients that DDP joins to one collective."""
    static_graph: bool = False
    """DDP: the same parameters get a gradient in every step; saves a search per step."""
    compression: Literal["none", "bf16", "powersgd"] = "none"
    """DDP: gradients travel whole, as bfloat16, or as low-rank factors (Vogels et al. 2019)."""
    powersgd_rank: Annotated[int, Field(ge=1, le=1024)] = 2
    """Rank of PowerSGD's factors."""
    powersgd_start_step: Annotated[int, Field(ge=2)] = 10
    """Steps with whole gradients before PowerSGD begins."""
    reshard_after_forward: bool = True
    """FSDP: free the gathered weights between forward and backward: less memory, one more gather."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.strategy == "fsdp" and self.compression != "none":
            raise ValueError(f"compression {self.compression} works with strategy ddp only; set it to none")
        return self


class PrecisionSettings(Node):
    """Number formats of the computation; weights are kept in fp32."""

    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of forward and loss; `fp16` needs a GPU and scales the loss."""
    tf32: bool = False
    """Let a GPU multiply fp32 matrices in TF32."""
    compile: bool = False
    """Compile the model (`torch.compile`); where that fails, a warning is given and the model runs as it is."""


class GroupSettings(Node):
    """Parameters that are treated in their own way; the first group whose pattern matches decides."""

    pattern: Pattern
    """Names of the parameters, as in `fnmatch`."""
    learning_rate_factor: Annotated[float, Field(ge=0.0, le=1000.0)] = 1.0
    """Their learning rate as a multiple of the optimiser's."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    """Their decay; null keeps the optimiser's."""


class ScheduleSettings(Node):
    """The learning rate over the run: a factor on the peak, a pure function of the step but for `plateau`."""

    name: Literal["constant", "linear", "cosine", "step", "one_cycle", "plateau"] = "cosine"
    """After the warm-up: stay; fall in a line; half a cosine; a factor every `step_epochs`; one cycle (Smith 2018,
    with a warm-up of its own); a factor whenever the deciding metric stands still."""
    warmup: Share = 0.05
    """Share of all steps with a linear rise from 0 (`one_cycle`: of its rise; 0.3 is usual)."""
    final: Share = 0.0
    """Factor at the end of `linear` and `cosine`, and the lowest that `plateau` goes to."""
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """What `step` and `plateau` multiply by."""
    step_epochs: Annotated[int, Field(ge=1)] = 10
    """Epochs between two falls of `step`."""
    patience: Annotated[int, Field(ge=0)] = 3
    """Evaluations without a better metric that `plateau` waits."""
    min_delta: Annotated[float, Field(ge=0.0)] = 1e-4
    """What counts as better for `plateau`, relative to the best so far."""
    start: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.04
    """Factor at which `one_cycle` begins."""


class OptimizerSettings(Node):
    """How the weights move."""

    name: Literal["sgd", "adam", "adamw", "adagrad", "rmsprop"] = "adamw"
    """The optimiser of `torch.optim`."""
    learning_rate: Annotated[float, Field(gt=0.0, le=100.0)] = 2e-3
    """The peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 1e-2
    """Decay as the optimiser has it: decoupled in adamw, added to the gradient elsewhere."""
    decay_norm_and_bias: bool = False
    """Whether parameters of one dimension (norms, biases) decay too."""
    momentum: Share = 0.9
    """Of sgd and rmsprop."""
    nesterov: bool = True
    """Of sgd."""
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [0.9, 0.999])
    """Of adam and adamw."""
    epsilon: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-8
    """Of adam, adamw, adagrad and rmsprop."""
    alpha: Share = 0.99
    """Smoothing of rmsprop."""
    groups: list[GroupSettings] = Field(default_factory=list)
    """Parameters with learning rates or decay of their own."""
    l1: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Weight of the sum of absolute values added to the loss (with `l2` together: elastic net)."""
    l2: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Weight of half the sum of squares added to the loss; under adam not the same as decay."""
    clip_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Gradients are scaled down to this L2 norm; null switches it off."""
    clip_value: Annotated[float, Field(gt=0.0)] | None = None
    """Each gradient is cut to this absolute value, before the norm; null switches it off."""
    accumulate: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Parts in which each rank's share of a global batch goes through the model one after the other."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay of a moving average of the weights, which is then evaluated and published; null keeps none."""
    label_smoothing: Share = 0.0
    """Passed to the task's loss."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning rate over the run."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.nesterov and self.name == "sgd" and self.momentum == 0.0:
            raise ValueError("nesterov needs momentum above 0; set nesterov to false")
        return self


class InitialSettings(Node):
    """The weights a run starts from."""

    weights: str | None = None
    """Null: random, by the seed. Else a model version of the registry (`model:NAME[@ALIAS|:N]`), a run's newest
    checkpoint (`run:NAME` or `run:NAME@STEP`), a safetensors file (`file:///...`, `s3://...` or a path), or a
    Hugging Face model folder (a path with config.json and *.safetensors)."""
    optimizer: bool = False
    """With `run:`: take the optimiser's state too."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Prefixes of tensor names to exchange before matching, old to new; e.g. `{"bert.": "encoder."}`."""
    ignore: list[Pattern] = Field(default_factory=list)
    """Tensors of the source that are left out (`classifier.*` for a new head)."""
    at_least: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Share of the model's values that must be matched, else the run is refused before it starts."""


class UnfreezeSettings(Node):
    """Parameters that begin to learn later."""

    epoch: Annotated[int, Field(ge=1)]
    """From the start of this epoch (the first is 0)."""
    patterns: Annotated[list[Pattern], Field(min_length=1)]
    """Names of the parameters."""


class LoraSettings(Node):
    """Low-rank adapters (Hu et al. 2021) through `peft`; merged into the weights when the model is published."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    """Their weight is alpha / rank."""
    dropout: Share = 0.0
    """On the adapters' input."""
    targets: Annotated[list[str], Field(min_length=1)]
    """Names (endings) of the linear layers that get one."""
    train: list[Pattern] = Field(default_factory=list)
    """Other parameters that learn in full (a new head)."""


class TransferSettings(Node):
    """What learns, and when."""

    freeze: list[Pattern] = Field(default_factory=list)
    """Parameters that do not learn."""
    unfreeze: list[UnfreezeSettings] = Field(default_factory=list)
    """Frozen parameters that begin to learn at an epoch."""
    lora: LoraSettings | None = None
    """Adapters instead of the weights themselves."""


class SamplingSettings(Node):
    """How rows are weighed."""

    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """Weight of each row's loss by its label: rows / (classes x rows of the class), or as given by label."""
    weighted: Literal["none", "balanced"] = "none"
    """`balanced`: each epoch draws as many rows as there are, with replacement, every class equally often."""


class StoppingSettings(Node):
    """When training ends before the last epoch."""

    metric: str | None = None
    """Metric that is watched; null takes the one by which the task decides."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Evaluations without a better value after which training ends; null never ends it."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """Smallest change that counts as better."""
    target: float | None = None
    """Training ends once the metric is this good."""


class CheckpointSettings(Node):
    """When the state of a run is made durable."""

    every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = 100
    """Steps between two checkpoints; one more is written after the last step. `auto`: as often as pays, by what a
    checkpoint costs and how often the run fails (Daly 2006), within `min_s` and `max_s`."""
    min_s: Annotated[float, Field(ge=0.0, le=86_400.0)] = 5.0
    """Seconds between two checkpoints at least, with `every_steps: auto`; and before the first, which measures."""
    max_s: Annotated[float, Field(gt=0.0, le=604_800.0)] = 600.0
    """Seconds between two checkpoints at most, with `every_steps: auto`."""
    grace_s: Annotated[float, Field(gt=0.0, le=86_400.0)] = 30.0
    """Seconds that a worker has from the notice of a preemption to its end, where the notice does not say; on
    Kubernetes the pod's `terminationGracePeriodSeconds`. A run that is found to need more warns."""
    keep: Annotated[int, Field(ge=2, le=1000)] = 3
    """Newest verified checkpoints kept beside the best; two at least, so that a damaged one has a predecessor."""
    hot: bool = True
    """Keep a copy of the state in shared memory of each node, so that a lost worker costs no more than one step."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_s > self.max_s:
            raise ValueError(f"min_s is {self.min_s:g}, more than max_s ({self.max_s:g}); lower it")
        return self


class LoggingSettings(Node):
    """What is noted while training."""

    every_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between two readings of loss and gradient norm: on a GPU each one waits for the device."""
    tensorboard: bool = False
    """Also write TensorBoard event files under the run's folder (extra `tensorboard`)."""


class WatchdogSettings(Node):
    """When a rank that stands still counts as hung and is replaced."""

    enabled: bool = True
    """Watch the ranks. Without it a hung rank is noticed after minutes only, when a collective times out."""
    floor_s: Annotated[float, Field(ge=1.0, le=86_400.0)] = 10.0
    """Seconds of standing still, at the least, before a rank counts as hung; what is slow by its nature (the start,
    the first step, a checkpoint, an evaluation, waiting for data) is given a multiple of it."""
    factor: Annotated[float, Field(ge=2.0, le=10_000.0)] = 10.0
    """With steps that take longer: median steps of standing still before a rank counts as hung."""


class WorkerRange(Node):
    """A number of workers that follows what the cluster has."""

    min: Annotated[int, Field(ge=1, le=100_000)] = 1
    """The run waits where there is room for fewer."""
    max: Annotated[int, Field(ge=1, le=100_000)]
    """The run never has more."""
    grow_after_s: Annotated[float, Field(ge=0.0, le=86_400.0)] = 60.0
    """Seconds for which there must be room for more workers, without a break, before the run grows into it; it does so
    at its next checkpoint. It shrinks at once."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max ({self.max}); lower it")
        return self


def _kind_of_workers(value: object) -> str:
    return "<range>" if isinstance(value, dict | WorkerRange) else "<number>"


Workers = Annotated[
    Annotated[Annotated[int, Field(ge=1, le=100_000)], Tag("<number>")] | Annotated[WorkerRange, Tag("<range>")],
    Discriminator(_kind_of_workers),
]
"""A number of workers, or a range."""


class TrainingSettings(Node):
    """How the model is trained."""

    epochs: Annotated[int, Field(ge=1, le=1_000_000)] = 12
    """Passes over the training rows; each row is used exactly once in each."""
    global_batch: Annotated[int, Field(ge=1, le=10_000_000)] = 64
    """Rows per optimiser step over all ranks together; fixed, whatever the number of workers."""
    workers: Workers = 2
    """Ranks, one process each: a number, or `{min: 1, max: 8}` for as many as there is room for (elastic)."""
    cpus_per_worker: Annotated[int, Field(ge=1, le=4096)] = 1
    """CPUs that Ray reserves for each rank; also its torch threads."""
    gpu: bool = False
    """One GPU per rank (NCCL); otherwise CPU (gloo)."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides initial weights, sample order, augmentation and dropout."""
    deterministic: bool = False
    """Use deterministic algorithms only: the same bits again at the same world size, also on a GPU."""
    max_failures: Annotated[int, Field(ge=0, le=10_000)] = 3
    """Failures without progress that the run goes on after; the next one ends it. Preemptions and waiting for storage
    or nodes are not counted, and a failure is forgotten with progress: it weighs half as much after each 1,000 steps or
    hour of it. An error of the training code is tried again once, whatever is set here."""
    standby: bool = True
    """On CPUs, keep one process per node ready that has imported everything and takes a lost rank's place at once; it
    is started some time into a run, computes nothing, and takes about 400 MB."""
    max_nonfinite: Annotated[int, Field(ge=1, le=1000)] = 3
    """Steps in a row with a loss or gradient that is not finite (each is skipped by all ranks) after which the run goes
    back to the last good checkpoint and leaves those batches out."""
    divergence_every_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 50
    """With `parallel.strategy: ddp`, steps between two comparisons of the ranks' weights, which must be equal bit for
    bit, beside one before each checkpoint; where they differ, the run goes back to its newest checkpoint. 0: never."""
    evaluate_every_epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs between two evaluations; one more is made after the last step."""
    parallel: ParallelSettings = ParallelSettings()
    """How the model is spread over the ranks."""
    precision: PrecisionSettings = PrecisionSettings()
    """Number formats."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How the weights move."""
    initial: InitialSettings = InitialSettings()
    """The weights a run starts from."""
    transfer: TransferSettings = TransferSettings()
    """What learns, and when."""
    sampling: SamplingSettings = SamplingSettings()
    """How rows are weighed."""
    stopping: StoppingSettings = StoppingSettings()
    """When training ends early."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """When the state is made durable."""
    logging: LoggingSettings = LoggingSettings()
    """What is noted."""
    watchdog: WatchdogSettings = WatchdogSettings()
    """When a hung rank is replaced."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Values for a training function of your own (`run_distributed`): passed to it as they are."""

    @property
    def fewest_workers(self) -> int:
        """Ranks that the run has at least."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def most_workers(self) -> int:
        """Ranks that the run has at most."""
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def grow_after_s(self) -> float | None:
        """Seconds for which there must be room before the run grows; None where its number of ranks is fixed."""
        fixed = self.fewest_workers == self.most_workers
        return self.workers.grow_after_s if isinstance(self.workers, WorkerRange) and not fixed else None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.precision.compute == "fp16" and not self.gpu:
            raise ValueError("precision.compute fp16 needs gpu: true; on a CPU take bf16 or fp32")
        if self.optimizer.accumulate > self.global_batch:
            raise ValueError(
                f"optimizer.accumulate is {self.optimizer.accumulate}: more parts than the {self.global_batch} rows "
                "of global_batch; lower it"
            )
        if self.transfer.lora is not None and self.parallel.strategy == "fsdp":
            raise ValueError("transfer.lora works with parallel.strategy ddp only")
        return self
