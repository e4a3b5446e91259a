"""
Registered data sets of others (config/datasets.yaml) that world_model.data names.

needs   the network, or a copy of the set (episodes.recorded.copies)
makes   results/downloads/<dataset>/, and results/episodes/<dataset>/<split>/episodes.parquet, written last, with
        rejected.parquet, provenance.json, and one mp4 and one npz per episode beside it
        `--config dataset=bridge_v2` narrows the target recorded_data to one set, which world_model.data need not name
how     shards are converted in groups, one job each; downloads and conversions that were cut continue where they stopped.
        Fetch and convert without training: `snakemake … recorded_data`. Any set's episodes can be looked at, also the lab's:
        `snakemake … results/figures/episodes/<dataset>/<split>/contact_sheet.png`
"""


# Not part of `all`: ask for it by name, or for recorded_data.
rule inspect_episodes:
    input:
        lambda wildcards: flow.store(wildcards.dataset, wildcards.split),
    output:
        sheet=report(
            f"{results}/figures/episodes/{{dataset}}/{{split}}/contact_sheet.png",
            caption="../config/report/episodes.rst",
            category="Recorded data",
            labels={"result": "{dataset}, {split}: frames", "form": "figure"},
        ),
        actions=report(
            f"{results}/figures/episodes/{{dataset}}/{{split}}/actions.png",
            caption="../config/report/episodes.rst",
            category="Recorded data",
            labels={"result": "{dataset}, {split}: actions", "form": "figure"},
        ),
        alignment=report(
            f"{results}/figures/episodes/{{dataset}}/{{split}}/alignment.csv",
            caption="../config/report/episodes.rst",
            category="Recorded data",
        ),
    log:
        f"{results}/logs/inspect_episodes/{{dataset}}/{{split}}.log",
    conda:
        "../envs/base.yaml"
    params:
        folder=lambda wildcards, output: Path(output.sheet).parent,
        convention=flow.config.world_model.convention,
    shell:
        "python -m workflow_src.episodes.inspect {input:q} --out {params.folder} --convention {params.convention}"
        " 2>&1 | tee {log}"


rule recorded_data:
    input:
        flow.recorded_data,


if flow.recorded:

    rule download_dataset:
        input:
            registry=flow.stage("datasets/{dataset}"),
        output:
            f"{results}/downloads/{{dataset}}/download.json",
        log:
            f"{results}/logs/download_dataset/{{dataset}}.log",
        wildcard_constraints:
            dataset=any_of(flow.recorded),
        retries: 1
        localrule: True
        conda:
            "../envs/base.yaml"
        params:
            folder=f"{results}/downloads",
        shell:
            "python -m workflow_src.episodes.download --dataset-name {wildcards.dataset} --registry {input.registry}"
            " --output-dir {params.folder} 2>&1 | tee {log}"

    rule convert_dataset:
        input:
            registry=flow.stage("datasets/{dataset}"),
            source=lambda wildcards: flow.source_file(wildcards.dataset),
        output:
            f"{results}/episodes/{{dataset}}/groups/{{group}}-of-{flow.config.episodes.recorded.groups}.json",
        log:
            f"{results}/logs/convert_dataset/{{dataset}}/{{group}}.log",
        benchmark:
            f"{results}/benchmarks/convert_dataset/{{dataset}}/{{group}}.jsonl"
        wildcard_constraints:
            dataset=any_of(flow.recorded),
            group=r"\d+",
        conda:
            lambda wildcards: flow.reader_environment
        container:
            lambda wildcards: flow.reader_image
        threads: 1
        resources:
            mem_mb=growing(4000),
            runtime=growing(480, DAY),
        params:
            reader=flow.reader,
            source=lambda wildcards: flow.source(wildcards.dataset),
            groups=flow.config.episodes.recorded.groups,
            size=flow.config.lab.image_size,
        shell:
            "{params.reader} --dataset {wildcards.dataset} --registry {input.registry}"
            " --source {params.source:q} --shard-group {wildcards.group}/{params.groups} --size {params.size}"
            " --out {output} 2>&1 | tee {log}"

    rule merge_dataset:
        input:
            lambda wildcards: flow.groups(wildcards.dataset),
        output:
            f"{results}/episodes/{{dataset}}/{{split}}/episodes.parquet",
        log:
            f"{results}/logs/merge_dataset/{{dataset}}/{{split}}.log",
        wildcard_constraints:
            dataset=any_of(flow.recorded),
            split="train|validation|val|test",
        localrule: True
        conda:
            "../envs/base.yaml"
        params:
            max_rejected=flow.config.episodes.recorded.max_rejected,
        shell:
            "python -m workflow_src.episodes.merge --groups {input:q} --split {wildcards.split}"
            " --max-rejected {params.max_rejected} --out {output} 2>&1 | tee {log}"
