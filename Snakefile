# Rehearsal: rank robot policies by rehearsing them inside a learned world model.
#
#   snakemake --cores all --use-conda results/tables/policy_ranking.csv
#   snakemake --cores all --configfile config/worldgym.yaml results/worldgym/figures/sweeps/sheet.png
#
# This file is the table of contents; each stage's rules, inputs and outputs are described in rules/<stage>.smk.
import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.20")

sys.path.insert(0, workflow.basedir)
from workflow_src.endings import nothing_to_publish
from workflow_src.execution import (
    contained,
    limit_gpus,
    limit_servers,
    local_gpus,
    preflight_command,
    rollout_retries,
    shell_prefix,
    show_in_images,
)
from workflow_src.preflight.costs import note_work
from workflow_src.resources import (
    DAY,
    growing,
    imagining_gpus,
    minutes,
    network_minutes,
    recording_memory,
    rollout_gpus,
    server_gpus,
    server_memory,
    training_cores,
    training_memory,
    training_processes,
)
from workflow_src.workflow import (
    CORRUPTIONS,
    WORLDS,
    any_of,
    open_workflow,
    require_keys,
)

# A configuration file given on the command line replaces the default one as a whole, so that policies can be left out.
if not workflow.overwrite_configfiles:

    configfile: f"{workflow.basedir}/config/config.yaml"


flow = open_workflow(config, local_gpus(workflow), contained(workflow))
results = flow.results
PUBLISHED = sorted(file.stem for file in Path(workflow.basedir, "config", "published").glob("*.csv"))
ROLLOUTS = "{results}/rollouts/{world}/{policy}/shard_{shard}/rollouts.parquet"
shell.prefix(shell_prefix(workflow.deployment_settings.deployment_method, flow.config, flow.devices))
limit_servers(workflow)
limit_gpus(workflow, flow.devices)
if flow.contained:
    show_in_images(workflow, flow.outside)


report: "config/report/workflow.rst"


# With --sdm apptainer; rules whose environment is another name theirs.
container: flow.image()


# A key that is missing after hours of work would be found out too late.
onstart:
    require_keys(flow, workflow.dag.needrun_jobs())
    note_work(flow.config, workflow.dag.needrun_jobs())


wildcard_constraints:
    dataset=any_of([flow.config.episodes.dataset, *flow.config.episodes.stores, *flow.recorded]),
    split=any_of(flow.config.episodes.splits),
    network=any_of(flow.config.behaviour_cloning) or "none",
    policy=any_of(flow.config.policies) or "none",
    world=any_of(WORLDS),
    shard=r"\d+",
    published=any_of(PUBLISHED),


# The default target stands first.
rule all:
    input:
        f"{results}/tables/policy_ranking.csv",
        f"{results}/tables/index.html",
        f"{results}/figures/policy_ranking.png",
        f"{results}/gallery/index.html",
        f"{results}/notebooks/policy_ranking.html",


# What the default target would run, why, what it would cost and what is missing: the same as `make preflight`.
rule preflight:
    localrule: True
    container:
        None
    shell:
        preflight_command(workflow, results)


include: "rules/episodes.smk"
include: "rules/datasets.smk"
include: "rules/world_model.smk"
include: "rules/published.smk"
include: "rules/policies.smk"
include: "rules/rollouts.smk"
include: "rules/judgements.smk"
include: "rules/analysis.smk"
include: "rules/notebooks.smk"
include: "rules/buckets.smk"
