"""
Tokenizer, latent cache and world model.

needs   episode stores of the splits train and validation, of every data set in world_model.data
makes   results/tokenizer/, results/latents/<dataset>/<split>/, results/world_model/ (each with one declared file, written
        last); no latents where world_model.latents is on_the_fly
how     a core per process: small networks gain nothing from threads (common/compute.py), so independent trainings run side
        by side and the world model on several processes under torchrun, one per granted GPU where there are some; state for
        resuming lies undeclared in results/state/
"""


rule train_tokenizer:
    input:
        config=flow.stage("tokenizer"),
        episodes=flow.seen_by_tokenizer("train"),
        validation=flow.seen_by_tokenizer("validation"),
    output:
        f"{results}/tokenizer/model.safetensors",
    log:
        f"{results}/logs/train_tokenizer.log",
    benchmark:
        f"{results}/benchmarks/train_tokenizer.jsonl"
    # Everything else waits for it.
    priority: 10
    conda:
        "../envs/base.yaml"
    threads: 1
    resources:
        gpu=flow.gpus(flow.config.gpus.tokenizer),
        nodes=1,
        mem_mb=growing(8000),
        runtime=minutes(flow.config.tokenizer.training.steps),
    params:
        state=f"{results}/state/tokenizer",
    shell:
        "lease {resources.gpu} python -m workflow_src.training.tokenizer"
        " --config {input.config} --episodes {input.episodes}"
        " --validation {input.validation} --out {output} --state {params.state} 2>&1 | tee {log}"


rule cache_latents:
    input:
        config=flow.stage("latents"),
        episodes=lambda wildcards: flow.store(wildcards.dataset, wildcards.split),
        tokenizer=flow.tokenizer,
    output:
        f"{results}/latents/{{dataset}}/{{split}}/latents.json",
    log:
        f"{results}/logs/cache_latents/{{dataset}}/{{split}}.log",
    benchmark:
        f"{results}/benchmarks/cache_latents/{{dataset}}/{{split}}.jsonl"
    conda:
        "../envs/base.yaml"
    threads: 1
    resources:
        gpu=flow.gpus(flow.config.gpus.latents),
        mem_mb=growing(8000),
        runtime=growing(240, DAY),
    params:
        tokenizer=f"{results}/tokenizer",
    shell:
        "lease {resources.gpu} python -m workflow_src.episodes.latents"
        " --config {input.config} --episodes {input.episodes:q}"
        " --tokenizer {params.tokenizer} --out {output} 2>&1 | tee {log}"


rule train_world_model:
    input:
        config=flow.stage("world_model"),
        latents=flow.caches("train", flow.mixture.names),
        episodes=[flow.store(dataset, "train") for dataset in flow.mixture.names],
        validation=flow.caches("validation", flow.mixture.names[:1]),
        validation_episodes=flow.store(flow.mixture.names[0], "validation"),
        tokenizer=flow.tokenizer,
    output:
        f"{results}/world_model/model.safetensors",
    log:
        f"{results}/logs/train_world_model.log",
    benchmark:
        f"{results}/benchmarks/train_world_model.jsonl"
    conda:
        "../envs/base.yaml"
    threads: training_cores(flow.config)
    resources:
        gpu=flow.gpus(flow.config.gpus.world_model),
        nodes=1,
        processes=training_processes(flow.config),
        mem_mb=training_memory(flow.config),
        runtime=minutes(flow.config.world_model.training.steps),
    params:
        state=f"{results}/state/world_model",
        tokenizer=f"{results}/tokenizer",
    # A lost process: all of them start again from the checkpoint. Without the variable they would look for each other at the
    # addresses of before (pytorch issue 135712).
    shell:
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        " lease {resources.gpu} torchrun --standalone --max-restarts=3"
        " --nproc-per-node=$(({resources.gpu} ? {resources.gpu} : {resources.processes}))"
        " -m workflow_src.training.world_model"
        " --config {input.config} --latents {input.latents} --episodes {input.episodes:q}"
        " --validation {input.validation} --validation-episodes {input.validation_episodes:q}"
        " --tokenizer {params.tokenizer} --out {output} --state {params.state} 2>&1 | tee {log}"


# Not part of `all`: ask for it by name.
rule sweep_world_model:
    input:
        world_model=f"{results}/world_model/model.safetensors",
        trials=f"{results}/trials/trials.json",
    output:
        report(
            f"{results}/figures/sweeps/sheet.png",
            caption="../config/report/sweeps.rst",
            category="World model",
            labels={"result": "does it follow the actions?", "form": "figure"},
        ),
    log:
        f"{results}/logs/sweep_world_model.log",
    benchmark:
        f"{results}/benchmarks/sweep_world_model.jsonl"
    conda:
        "../envs/base.yaml"
    resources:
        gpu=imagining_gpus(flow),
        mem_mb=growing(8000),
    params:
        world_model=f"{results}/world_model",
        trials=f"{results}/trials",
    shell:
        "lease {resources.gpu} python -m workflow_src.world_model.sweep"
        " --world-model {params.world_model} --frame {params.trials}"
        " --out {output} 2>&1 | tee {log}"
