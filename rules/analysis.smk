"""
Tables, figures, contact sheets, gallery.

needs   rollouts and judgements of every policy in both worlds
makes   results/tables/*.csv, results/figures/*.{png,svg,gif}, results/gallery/index.html
how     cheap, so their sources are inputs: an edit reruns them
"""


rule make_tables:
    input:
        config=flow.stage("analysis"),
        rollouts=flow.per_rollout(ROLLOUTS),
        judgements=flow.judgements(),
        sources=flow.sources("tables.py", "agreement.py", "correction.py", "statistics.py", "records.py"),
    output:
        ranking=report(
            f"{results}/tables/policy_ranking.csv",
            caption="../config/report/policy_ranking.rst",
            category="Ranking",
        ),
        per_task=report(
            f"{results}/tables/per_task.csv",
            caption="../config/report/per_task.rst",
            category="Ranking",
        ),
        agreement=report(
            f"{results}/tables/agreement.csv",
            caption="../config/report/agreement.rst",
            category="Agreement",
        ),
        judge=report(
            f"{results}/tables/judge.csv",
            caption="../config/report/judge.rst",
            category="Agreement",
        ),
    log:
        f"{results}/logs/make_tables.log",
    benchmark:
        f"{results}/benchmarks/make_tables.jsonl"
    conda:
        "../envs/base.yaml"
    shell:
        "python -m workflow_src.analysis.tables --config {input.config} --judgements {input.judgements}"
        " --rollouts {input.rollouts} --out-ranking {output.ranking} --out-per-task {output.per_task}"
        " --out-agreement {output.agreement} --out-judge {output.judge} 2>&1 | tee {log}"


rule draw_figures:
    input:
        config=flow.stage("analysis"),
        ranking=f"{results}/tables/policy_ranking.csv",
        per_task=f"{results}/tables/per_task.csv",
        agreement=f"{results}/tables/agreement.csv",
        world_model=f"{results}/world_model/model.safetensors",
        sources=flow.sources("figures.py", "labels.py"),
    output:
        ranking=report(
            f"{results}/figures/policy_ranking.png",
            caption="../config/report/ranking_figure.rst",
            category="Ranking",
        ),
        scatter=report(
            f"{results}/figures/real_vs_imagined.png",
            caption="../config/report/scatter.rst",
            category="Agreement",
        ),
        per_task=report(
            f"{results}/figures/per_task.png",
            caption="../config/report/per_task_figure.rst",
            category="Ranking",
        ),
        fidelity=report(
            f"{results}/figures/fidelity.png",
            caption="../config/report/fidelity.rst",
            category="World model",
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
        ),
        sheet=report(
            f"{results}/figures/contact_sheet.png",
            caption="../config/report/contact_sheet.rst",
            category="Rollouts",
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
