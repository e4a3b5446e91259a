"""
Tables, figures, contact sheets, gallery; on request failure optimism, and the same report on published numbers.

needs   rollouts and judgements of every policy in both worlds; for published numbers a CSV and nothing else
makes   results/tables/*.csv, results/figures/*.{png,svg,gif}, results/gallery/index.html;
        on request results/tables/failure_optimism.csv (a minute: replays of corrupted actions under results/corrupted/),
        results/published/<name>/*.{csv,png,svg,html} (`snakemake --cores 1 published`)
how     cheap, so their sources are inputs: an edit reruns them
"""

DRAWING = ("figures.py", "labels.py", "scatter.py", "statistics.py", "style.py")
STATISTICS = (
    "agreement.py",
    "cells.py",
    "comparisons.py",
    "components.py",
    "correction.py",
    "posterior.py",
    "prediction_powered.py",
    "records.py",
    "resampling.py",
    "rows.py",
    "statistics.py",
    "study.py",
    "tables.py",
)


rule make_tables:
    input:
        config=flow.stage("analysis"),
        rollouts=flow.per_rollout(ROLLOUTS),
        judgements=flow.judgements(),
        sources=flow.sources(*STATISTICS),
    output:
        ranking=report(
            f"{results}/tables/policy_ranking.csv",
            caption="../config/report/policy_ranking.rst",
            category="Ranking",
            labels={"result": "policies, best first", "form": "table"},
        ),
        per_task=report(
            f"{results}/tables/per_task.csv",
            caption="../config/report/per_task.rst",
            category="Ranking",
            labels={"result": "policies by task", "form": "table"},
        ),
        agreement=report(
            f"{results}/tables/agreement.csv",
            caption="../config/report/agreement.rst",
            category="Agreement",
            labels={"result": "statistics of agreement", "form": "table"},
        ),
        judge=report(
            f"{results}/tables/judge.csv",
            caption="../config/report/judge.rst",
            category="Agreement",
            labels={"result": "how often judges are right", "form": "table"},
        ),
        comparisons=report(
            f"{results}/tables/comparisons.csv",
            caption="../config/report/comparisons.rst",
            category="Ranking",
            labels={"result": "which policies differ", "form": "table"},
        ),
        prediction_powered=report(
            f"{results}/tables/prediction_powered.csv",
            caption="../config/report/prediction_powered.rst",
            category="Agreement",
            labels={"result": "real success from few real trials", "form": "table"},
        ),
        variance=report(
            f"{results}/tables/variance.csv",
            caption="../config/report/variance.rst",
            category="Agreement",
            labels={"result": "where rollouts scatter", "form": "table"},
        ),
    log:
        f"{results}/logs/make_tables.log",
    benchmark:
        f"{results}/benchmarks/make_tables.jsonl"
    localrule: True
    conda:
        "../envs/base.yaml"
    shell:
        "python -m workflow_src.analysis.tables --config {input.config} --judgements {input.judgements}"
        " --rollouts {input.rollouts} --out-ranking {output.ranking} --out-per-task {output.per_task}"
        " --out-agreement {output.agreement} --out-judge {output.judge} --out-comparisons {output.comparisons}"
        " --out-prediction-powered {output.prediction_powered} --out-variance {output.variance} 2>&1 | tee {log}"


TABLES = (
    "policy_ranking",
    "per_task",
    "comparisons",
    "agreement",
    "judge",
    "prediction_powered",
    "variance",
    "calibration",
    "corrected",
)


rule show_tables:
    input:
        tables=[f"{results}/tables/{name}.csv" for name in TABLES],
        captions=[f"{workflow.basedir}/config/report/{name}.rst" for name in TABLES],
        sources=flow.sources("table_page.py"),
    output:
        report(
            f"{results}/tables/index.html",
            caption="../config/report/tables.rst",
            category="Ranking",
            labels={"result": "all tables, to sort and search", "form": "page"},
        ),
    log:
        f"{results}/logs/show_tables.log",
    benchmark:
        f"{results}/benchmarks/show_tables.jsonl"
    localrule: True
    conda:
        "../envs/base.yaml"
    shell:
        "python -m workflow_src.analysis.table_page --tables {input.tables} --captions {input.captions} --out {output}"
        " 2>&1 | tee {log}"


rule draw_figures:
    input:
        config=flow.stage("analysis"),
        ranking=f"{results}/tables/policy_ranking.csv",
        per_task=f"{results}/tables/per_task.csv",
        agreement=f"{results}/tables/agreement.csv",
        world_model=f"{results}/world_model/model.safetensors",
        sources=flow.sources(*DRAWING),
    output:
        ranking=report(
            f"{results}/figures/policy_ranking.png",
            caption="../config/report/ranking_figure.rst",
            category="Ranking",
            labels={"result": "policies, best first", "form": "figure"},
        ),
        scatter=report(
            f"{results}/figures/real_vs_imagined.png",
            caption="../config/report/scatter.rst",
            category="Agreement",
            labels={"result": "real against imagined", "form": "figure"},
        ),
        reliability=report(
            f"{results}/figures/reliability.png",
            caption="../config/report/reliability.rst",
            category="Agreement",
            labels={"result": "are the rates right?", "form": "figure"},
        ),
        checkpoints=report(
            f"{results}/figures/checkpoints.png",
            caption="../config/report/checkpoints.rst",
            category="Ranking",
            labels={"result": "checkpoints of a training", "form": "figure"},
        ),
        per_task=report(
            f"{results}/figures/per_task.png",
            caption="../config/report/per_task_figure.rst",
            category="Ranking",
            labels={"result": "policies by task", "form": "figure"},
        ),
        fidelity=report(
            f"{results}/figures/fidelity.png",
            caption="../config/report/fidelity.rst",
            category="World model",
            labels={"result": "error over the horizon", "form": "figure"},
        ),
    log:
        f"{results}/logs/draw_figures.log",
    benchmark:
        f"{results}/benchmarks/draw_figures.jsonl"
    conda:
        "../envs/base.yaml"
    params:
        folder=f"{results}/figures",
        # Written by the training before the weights, therefore not declared.
        validation=f"{results}/world_model/validation.csv",
    shell:
        "python -m workflow_src.analysis.figures --config {input.config} --ranking {input.ranking}"
        " --per-task {input.per_task} --agreement {input.agreement} --validation {params.validation}"
        " --out-dir {params.folder} 2>&1 | tee {log}"


rule show_rollouts:
    input:
        config=flow.stage("analysis"),
        rollouts=flow.per_rollout(ROLLOUTS),
        judgements=flow.judgements(),
        sources=flow.sources("gallery.py", "gallery.html", "contact_sheet.py", "pairs.py", "records.py"),
    output:
        gallery=report(
            f"{results}/gallery/index.html",
            caption="../config/report/gallery.rst",
            category="Rollouts",
            labels={"result": "rollouts that play", "form": "page"},
        ),
        sheet=report(
            f"{results}/figures/contact_sheet.png",
            caption="../config/report/contact_sheet.rst",
            category="Rollouts",
            labels={"result": "imagined beside real", "form": "figure"},
        ),
    log:
        f"{results}/logs/show_rollouts.log",
    benchmark:
        f"{results}/benchmarks/show_rollouts.jsonl"
    conda:
        "../envs/base.yaml"
    params:
        folder=f"{results}/figures",
    shell:
        "(python -m workflow_src.analysis.contact_sheet --config {input.config} --rollouts {input.rollouts}"
        " --judgements {input.judgements} --out-dir {params.folder}"
        " && python -m workflow_src.analysis.gallery --config {input.config} --rollouts {input.rollouts}"
        " --judgements {input.judgements} --out {output.gallery}) 2>&1 | tee {log}"


rule replay_corrupted:
    input:
        config=flow.stage("corruptions"),
        trials=f"{results}/trials/trials.json",
        rollouts=flow.per_rollout(ROLLOUTS, ["lab"]),
        world_model=f"{results}/world_model/model.safetensors",
    output:
        expand(f"{results}/corrupted/{{world}}/{{corruption}}/rollouts.parquet", world=WORLDS, corruption=CORRUPTIONS),
    log:
        f"{results}/logs/replay_corrupted.log",
    benchmark:
        f"{results}/benchmarks/replay_corrupted.jsonl"
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        gpu=imagining_gpus(flow),
        mem_mb=growing(8000),
    params:
        folder=f"{results}/corrupted",
    shell:
        "lease {resources.gpu} python -m workflow_src.rollouts.corruptions"
        " --config {input.config} --trials {input.trials}"
        " --rollouts {input.rollouts} --world-model {input.world_model} --out {params.folder} 2>&1 | tee {log}"


rule judge_corrupted:
    input:
        config=flow.stage("judges"),
        judge=f"{results}/judge/model.safetensors",
        rollouts=rules.replay_corrupted.output,
    output:
        f"{results}/corrupted/judgements.parquet",
    log:
        f"{results}/logs/judge_corrupted.log",
    benchmark:
        f"{results}/benchmarks/judge_corrupted.jsonl"
    conda:
        "../envs/base.yaml"
    threads: 1
    resources:
        gpu=flow.gpus(flow.config.gpus.judges),
        mem_mb=growing(8000),
    shell:
        "lease {resources.gpu} python -m workflow_src.judges.score --config {input.config} --judge {input.judge}"
        " --rollouts {input.rollouts} --out {output} 2>&1 | tee {log}"


rule show_optimism:
    input:
        config=flow.stage("analysis"),
        rollouts=rules.replay_corrupted.output,
        judgements=rules.judge_corrupted.output,
        sources=flow.sources("optimism.py", "contact_sheet.py", "pairs.py", "records.py", "statistics.py", "style.py"),
    output:
        table=report(
            f"{results}/tables/failure_optimism.csv",
            caption="../config/report/failure_optimism.rst",
            category="World model",
            labels={"result": "spoiled actions that succeed", "form": "table"},
        ),
        figure=report(
            f"{results}/figures/failure_optimism.png",
            caption="../config/report/failure_optimism.rst",
            category="World model",
            labels={"result": "spoiled actions that succeed", "form": "figure"},
        ),
        examples=report(
            f"{results}/figures/failure_examples.png",
            caption="../config/report/failure_examples.rst",
            category="World model",
            labels={"result": "spoiled actions: examples", "form": "figure"},
        ),
    log:
        f"{results}/logs/show_optimism.log",
    benchmark:
        f"{results}/benchmarks/show_optimism.jsonl"
    conda:
        "../envs/base.yaml"
    params:
        folder=f"{results}/figures",
    shell:
        "python -m workflow_src.analysis.optimism --config {input.config} --rollouts {input.rollouts}"
        " --judgements {input.judgements} --out {output.table} --out-dir {params.folder} 2>&1 | tee {log}"


rule report_published:
    input:
        pairs=f"{workflow.basedir}/config/published/{{published}}.csv",
        sources=flow.sources(*STATISTICS, *DRAWING, "report.py"),
    output:
        ranking=f"{results}/published/{{published}}/policy_ranking.csv",
        per_task=f"{results}/published/{{published}}/per_task.csv",
        agreement=f"{results}/published/{{published}}/agreement.csv",
        comparisons=f"{results}/published/{{published}}/comparisons.csv",
        scatter=f"{results}/published/{{published}}/real_vs_imagined.png",
    log:
        f"{results}/logs/report_published/{{published}}.log",
    conda:
        "../envs/base.yaml"
    params:
        folder=f"{results}/published/{{published}}",
    shell:
        "python -m workflow_src.analysis.agreement --pairs {input.pairs} --out {params.folder} 2>&1 | tee {log}"


rule draw_experiments:
    input:
        versions=f"{workflow.basedir}/config/published/experiments/versions.csv",
        shifts=f"{workflow.basedir}/config/published/experiments/out_of_distribution.csv",
        sources=flow.sources("experiments.py", "statistics.py", "style.py"),
    output:
        versions=report(
            f"{results}/published/experiments/versions.png",
            caption="../config/report/versions.rst",
            category="Published numbers",
            labels={"result": "versions of policies", "form": "figure"},
        ),
        shifts=report(
            f"{results}/published/experiments/out_of_distribution.png",
            caption="../config/report/out_of_distribution.rst",
            category="Published numbers",
            labels={"result": "changed scenes and words", "form": "figure"},
        ),
    log:
        f"{results}/logs/draw_experiments.log",
    conda:
        "../envs/base.yaml"
    params:
        folder=f"{results}/published/experiments",
    shell:
        "python -m workflow_src.analysis.experiments --versions {input.versions} --shifts {input.shifts}"
        " --out-dir {params.folder} 2>&1 | tee {log}"
