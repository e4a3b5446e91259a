"""
Published weights: a world model that others have trained, and the autoencoder it works on.

needs   the network, for what is configured by its address (world_model.source, tokenizer.source)
makes   results/tokenizer/ where tokenizer.kind is sd3, results/downloads/, and results/world_model/ in place of a training
how     a download that was cut continues where it stopped, also in a later run, and is verified; `HF_TOKEN` comes from the
        environment. A checkpoint that is a file here is read where it is
"""

if flow.config.tokenizer.kind == "sd3":

    rule fetch_tokenizer:
        output:
            flow.tokenizer,
        log:
            f"{results}/logs/fetch_tokenizer.log",
        retries: 1
        localrule: True
        conda:
            "../envs/base.yaml"
        params:
            source=flow.config.tokenizer.source,
            revision=flow.config.tokenizer.revision,
            folder=f"{results}/tokenizer",
        shell:
            "python -m workflow_src.world_model.tokenizer_sd3 {params.source:q} --revision {params.revision:q}"
            " --out {params.folder} 2>&1 | tee {log}"


if flow.config.world_model.source.checkpoint:

    ruleorder: import_world_model > train_world_model

    rule fetch_checkpoint:
        output:
            f"{results}/downloads/checkpoint.pt",
        log:
            f"{results}/logs/fetch_checkpoint.log",
        retries: 1
        localrule: True
        conda:
            "../envs/base.yaml"
        resources:
            # Pinned afterwards, it must not fetch gigabytes again; `import_world_model` checks it too.
            sha256=flow.config.world_model.source.sha256,
        params:
            address=flow.config.world_model.source.checkpoint,
        shell:
            "python -m workflow_src.common.fetch {params.address:q} --out {output} --sha256 {resources.sha256:q}"
            " 2>&1 | tee {log}"

    rule import_world_model:
        input:
            config=flow.stage("world_model"),
            checkpoint=flow.checkpoint,
            tokenizer=flow.tokenizer,
        output:
            f"{results}/world_model/model.safetensors",
        log:
            f"{results}/logs/import_world_model.log",
        benchmark:
            f"{results}/benchmarks/import_world_model.jsonl"
        conda:
            "../envs/base.yaml"
        threads: 1
        resources:
            # The published file holds optimiser states too, and both it and what is made of it are in memory at once.
            mem_mb=growing(24000),
        params:
            folder=f"{results}/world_model",
            vae=f"{results}/tokenizer/vae",
        shell:
            "python -m workflow_src.world_model.import_worldgym {input.checkpoint:q} --config {input.config}"
            " --vae {params.vae} --out {params.folder} 2>&1 | tee {log}"
