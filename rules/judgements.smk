"""
Judgements: success from video, and how far each judge can be trusted.

needs   the judge split (episodes nothing else trains on), the tokenizer, rollouts; labels and servers where configured
makes   results/judge/ (classifier and state read-out), results/judgements/<judge>.parquet, one row per rollout and judge;
        results/calibration/<judge>.parquet (every judge on clips with known labels), results/tables/calibration.csv and
        corrected.csv
how     the learned judges and the lab's truth are one job, because loading costs more than judging; every other judge has
        its own, so that a paid one reruns for nobody else's sake. Answers that were paid for are kept in results/state/
"""


wildcard_constraints:
    vlm=any_of(flow.config.judges.vlm) or "none",


rule train_judge:
    input:
        config=flow.stage("judges"),
        episodes=f"{flow.episodes}/judge/episodes.parquet",
        tokenizer=flow.tokenizer,
    output:
        f"{results}/judge/model.safetensors",
    log:
        f"{results}/logs/train_judge.log",
    benchmark:
        f"{results}/benchmarks/train_judge.jsonl"
    conda:
        "../envs/base.yaml"
    threads: 1
    resources:
        gpu=flow.gpus(flow.config.gpus.judges),
        nodes=1,
        mem_mb=growing(8000),
        runtime=minutes(flow.config.judges.training.steps),
    params:
        state=f"{results}/state/judge",
        tokenizer=f"{results}/tokenizer",
    shell:
        "lease {resources.gpu} python -m workflow_src.training.judge"
        " --config {input.config} --episodes {input.episodes}"
        " --tokenizer {params.tokenizer} --out {output} --state {params.state} 2>&1 | tee {log}"


rule judge_rollouts:
    input:
        config=flow.stage("judges"),
        judge=f"{results}/judge/model.safetensors",
        rollouts=flow.per_rollout(ROLLOUTS),
    output:
        f"{results}/judgements/learned.parquet",
    log:
        f"{results}/logs/judge_rollouts.log",
    benchmark:
        f"{results}/benchmarks/judge_rollouts.jsonl"
    conda:
        "../envs/base.yaml"
    threads: 1
    resources:
        gpu=flow.gpus(flow.config.gpus.judges),
        mem_mb=growing(8000),
    shell:
        "lease {resources.gpu} python -m workflow_src.judges.score --config {input.config} --judge {input.judge}"
        " --rollouts {input.rollouts} --out {output} 2>&1 | tee {log}"


rule ask_vlm:
    input:
        config=flow.stage("judges/{vlm}"),
        prompt=lambda wildcards: flow.prompt(wildcards.vlm),
        rollouts=lambda wildcards: flow.per_rollout(ROLLOUTS, flow.config.judges.vlm[wildcards.vlm].worlds),
    output:
        f"{results}/judgements/{{vlm}}.parquet",
    log:
        f"{results}/logs/ask_vlm/{{vlm}}.log",
    benchmark:
        f"{results}/benchmarks/ask_vlm/{{vlm}}.jsonl"
    conda:
        "../envs/base.yaml"
    threads: 1
    params:
        cache=f"{results}/state/judgements/{{vlm}}",
    shell:
        "python -m workflow_src.judges.vlm --config {input.config} --judge {wildcards.vlm} --prompt {input.prompt}"
        " --rollouts {input.rollouts} --cache {params.cache} --out {output} 2>&1 | tee {log}"


rule read_labels:
    input:
        labels=flow.config.judges.human.labels,
        sample=flow.config.judges.human.sample or [],
        rollouts=flow.per_rollout(ROLLOUTS),
    output:
        f"{results}/judgements/human.parquet",
    log:
        f"{results}/logs/read_labels.log",
    localrule: True
    conda:
        "../envs/base.yaml"
    params:
        sample=f"--sample {flow.config.judges.human.sample}" if flow.config.judges.human.sample else "",
    shell:
        "python -m workflow_src.judges.human --labels {input.labels} {params.sample} --rollouts {input.rollouts}"
        " --out {output} 2>&1 | tee {log}"


rule calibrate_judges:
    input:
        config=flow.stage("judges"),
        judge=f"{results}/judge/model.safetensors",
        rollouts=flow.per_rollout(ROLLOUTS, ["lab"]),
    output:
        f"{results}/calibration/learned.parquet",
    log:
        f"{results}/logs/calibrate_judges.log",
    benchmark:
        f"{results}/benchmarks/calibrate_judges.jsonl"
    conda:
        "../envs/base.yaml"
    threads: 1
    resources:
        gpu=flow.gpus(flow.config.gpus.judges),
        mem_mb=growing(8000),
    params:
        probes=flow.config.judges.probes,
    shell:
        "lease {resources.gpu} python -m workflow_src.judges.calibrate --config {input.config} --weights {input.judge}"
        " --rollouts {input.rollouts} --count {params.probes} --out {output} 2>&1 | tee {log}"


rule calibrate_vlm:
    input:
        config=flow.stage("judges/{vlm}"),
        prompt=lambda wildcards: flow.prompt(wildcards.vlm),
        rollouts=flow.per_rollout(ROLLOUTS, ["lab"]),
        # One job at a time may ask with a judge's cache and spend from its budget.
        after=f"{results}/judgements/{{vlm}}.parquet",
    output:
        f"{results}/calibration/{{vlm}}.parquet",
    log:
        f"{results}/logs/calibrate_vlm/{{vlm}}.log",
    benchmark:
        f"{results}/benchmarks/calibrate_vlm/{{vlm}}.jsonl"
    conda:
        "../envs/base.yaml"
    threads: 1
    params:
        cache=f"{results}/state/judgements/{{vlm}}",
        probes=flow.config.judges.probes,
    shell:
        "python -m workflow_src.judges.calibrate --config {input.config} --vlm {wildcards.vlm} --prompt {input.prompt}"
        " --cache {params.cache} --rollouts {input.rollouts} --count {params.probes} --out {output} 2>&1 | tee {log}"


rule tabulate_calibration:
    input:
        config=flow.stage("analysis"),
        judgements=flow.judgements(),
        probes=flow.probes(),
        sources=flow.sources("calibration.py", "correction.py", "tables.py", "statistics.py", "records.py"),
    output:
        calibration=report(
            f"{results}/tables/calibration.csv",
            caption="../config/report/calibration.rst",
            category="Agreement",
            labels={"result": "judges on known outcomes", "form": "table"},
        ),
        corrected=report(
            f"{results}/tables/corrected.csv",
            caption="../config/report/corrected.rst",
            category="Agreement",
            labels={"result": "rates corrected for judges", "form": "table"},
        ),
    log:
        f"{results}/logs/tabulate_calibration.log",
    localrule: True
    conda:
        "../envs/base.yaml"
    shell:
        "python -m workflow_src.analysis.calibration --config {input.config} --judgements {input.judgements}"
        " --probes {input.probes} --out-calibration {output.calibration} --out-corrected {output.corrected}"
        " 2>&1 | tee {log}"
