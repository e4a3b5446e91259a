"""
Rollouts: every policy in the lab and in the world model, from the same first frames, by the same code.

needs   trials, the world model, a policy endpoint (a service job's, or a server that is already running)
makes   results/trials/trials.json; results/downloads/first_frames/ where a suite names public lists;
        results/rollouts/<world>/<policy>/shard_<i>/rollouts.parquet, written last, beside one video and one npz per rollout
how     one job rolls a (policy, shard) out in both worlds; finished rollouts are not redone after an interruption
"""

if flow.gathered:

    rule fetch_first_frames:
        output:
            f"{results}/downloads/first_frames/{{task}}/frames.json",
        log:
            f"{results}/logs/fetch_first_frames/{{task}}.log",
        wildcard_constraints:
            task=any_of(flow.lists) or "none",
        retries: 2
        localrule: True
        conda:
            "../envs/base.yaml"
        params:
            address=lambda wildcards: flow.lists[wildcards.task],
        shell:
            "python -m workflow_src.rollouts.first_frames {params.address:q} --out {output} 2>&1 | tee {log}"

    rule gather_trials:
        input:
            config=flow.stage("trials"),
            frames=[f"{results}/downloads/first_frames/{task}/frames.json" for task in flow.lists],
            pictures=flow.pictures,
            sources=flow.trial_sources,
        output:
            f"{results}/trials/trials.json",
        log:
            f"{results}/logs/gather_trials.log",
        conda:
            "../envs/base.yaml"
        shell:
            "python -m workflow_src.rollouts.gather --config {input.config} --frames {input.frames} --out {output}"
            " 2>&1 | tee {log}"

else:

    rule draw_trials:
        input:
            config=flow.stage("trials"),
        output:
            f"{results}/trials/trials.json",
        log:
            f"{results}/logs/draw_trials.log",
        localrule: True
        conda:
            "../envs/base.yaml"
        shell:
            "python -m workflow_src.rollouts.trials --config {input.config} --out {output} 2>&1 | tee {log}"


rule rollouts:
    input:
        flow.per_rollout(ROLLOUTS),


rule roll_out:
    input:
        unpack(
            lambda wildcards: (
                {"endpoint": f"{results}/endpoints/{wildcards.policy}/{wildcards.shard}.json"}
                if flow.served(wildcards.policy)
                else {}
            )
        ),
        config=flow.stage("policies/{policy}"),
        networks=lambda wildcards: flow.network_files(wildcards.policy),
        trials=f"{results}/trials/trials.json",
        world_model=f"{results}/world_model/model.safetensors",
    output:
        lab=f"{results}/rollouts/lab/{{policy}}/shard_{{shard}}/rollouts.parquet",
        world_model=f"{results}/rollouts/world_model/{{policy}}/shard_{{shard}}/rollouts.parquet",
    log:
        f"{results}/logs/roll_out/{{policy}}/{{shard}}.log",
    benchmark:
        f"{results}/benchmarks/roll_out/{{policy}}/{{shard}}.jsonl"
    retries: rollout_retries(workflow)
    conda:
        "../envs/base.yaml"
    threads: 1
    resources:
        servers=lambda wildcards: int(flow.served(wildcards.policy)),
        gpu=rollout_gpus(flow),
        cpus_per_task=1,
        mem_mb=growing(6000),
        runtime=growing(480, DAY),
        # Patience in seconds is no part of a result: as resources, these rerun nothing.
        server_deadline=flow.config.rollouts.server_deadline,
        step_timeout=flow.config.rollouts.step_timeout,
    params:
        endpoint=lambda wildcards, input: input.get("endpoint") or flow.config.policies[wildcards.policy].endpoint,
        shards=flow.config.rollouts.shards,
    shell:
        "lease {resources.gpu} python -m workflow_src.rollouts.run --config {input.config} --policy {wildcards.policy}"
        " --shard {wildcards.shard} --shards {params.shards} --endpoint {params.endpoint} --trials {input.trials}"
        " --world-model {input.world_model} --lab-out {output.lab} --world-model-out {output.world_model}"
        " --server-deadline {resources.server_deadline} --step-timeout {resources.step_timeout}"
        " 2>&1 | tee {log}"
