"""
Policies: training of the tabletop's own, and one server per (policy, shard).

needs   the train split; results/policies/<network>/ for policies that load a trained network
makes   results/policies/<network>/<network>.json beside its snapshots; an endpoint file for each running server
how     servers are service jobs, each in its policy's own environment: Snakemake starts one with the rollouts that
        consume it and ends it by SIGTERM when they are done, therefore `exec`
"""


rule train_policy_network:
    input:
        config=flow.stage("behaviour_cloning/{network}"),
        episodes=f"{flow.episodes}/train/episodes.parquet",
    output:
        f"{results}/policies/{{network}}/{{network}}.json",
    log:
        f"{results}/logs/train_policy_network/{{network}}.log",
    benchmark:
        f"{results}/benchmarks/train_policy_network/{{network}}.jsonl"
    conda:
        "../envs/base.yaml"
    threads: 1
    resources:
        gpu=flow.gpus(flow.config.gpus.behaviour_cloning),
        nodes=1,
        mem_mb=growing(8000),
        runtime=network_minutes(flow.config),
    params:
        state=f"{results}/state/policies/{{network}}",
    shell:
        "lease {resources.gpu} python -m workflow_src.training.behaviour_cloning"
        " --config {input.config} --network {wildcards.network}"
        " --episodes {input.episodes} --out {output} --state {params.state} 2>&1 | tee {log}"


rule serve_policy:
    input:
        config=flow.stage("policies/{policy}"),
        networks=lambda wildcards: flow.network_files(wildcards.policy),
    output:
        service(f"{results}/endpoints/{{policy}}/{{shard}}.json"),
    log:
        f"{results}/logs/serve_policy/{{policy}}/{{shard}}.log",
    conda:
        lambda wildcards: flow.environment(wildcards.policy)
    container:
        lambda wildcards: flow.image(wildcards.policy)
    threads: 0
    resources:
        # Shared with the rollouts: in the group of both, resources are summed (the longest `runtime` counts).
        gpu=server_gpus(flow),
        nodes=1,
        cpus_per_task=1,
        mem_mb=server_memory(flow.config),
        runtime=growing(480, DAY),
    params:
        networks=f"{results}/policies",
        python=lambda wildcards: flow.interpreter(wildcards.policy),
    shell:
        "exec {params.python} -m workflow_src.policies.serve --config {input.config} --policy {wildcards.policy}"
        " --networks {params.networks} --endpoint-file {output} --log {log} --threads 1 --gpus {resources.gpu}"


rule examine_policy:
    input:
        config=flow.stage("policies/{policy}"),
        networks=lambda wildcards: flow.network_files(wildcards.policy),
        trials=f"{results}/trials/trials.json",
    output:
        report(
            f"{results}/doctor/{{policy}}.csv",
            caption="../config/report/doctor.rst",
            category="Policies",
            labels={"result": "doctor on {policy}", "form": "table"},
        ),
    log:
        f"{results}/logs/examine_policy/{{policy}}.log",
    conda:
        lambda wildcards: flow.environment(wildcards.policy)
    container:
        lambda wildcards: flow.image(wildcards.policy)
    resources:
        gpu=server_gpus(flow),
        nodes=1,
        mem_mb=server_memory(flow.config),
    params:
        networks=f"{results}/policies",
        python=lambda wildcards: flow.interpreter(wildcards.policy),
        endpoint=lambda wildcards: flow.endpoint_arguments(wildcards.policy),
    shell:
        "lease {resources.gpu} {params.python} -m workflow_src.policies.doctor"
        " {wildcards.policy} {params.endpoint}--config {input.config}"
        " --networks {params.networks} --trials {input.trials} --out {output} 2>&1 | tee {log}"


rule doctor:
    input:
        [f"{results}/doctor/{policy}.csv" for policy in flow.config.policies],
