"""
Judgements: success from video.

needs   the judge split (episodes nothing else trains on), the tokenizer, rollouts
makes   results/judge/ (classifier and state read-out), results/judgements/judgements.parquet
how     one row per rollout and judge; lab rollouts get the simulator's truth as well; one job for all, because loading
        costs more than judging
"""


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
    params:
        state=f"{results}/state/judge",
        tokenizer=f"{results}/tokenizer",
    shell:
        "python -m workflow_src.training.judge --config {input.config} --episodes {input.episodes}"
        " --tokenizer {params.tokenizer} --out {output} --state {params.state} 2>&1 | tee {log}"


rule judge_rollouts:
    input:
        config=flow.stage("judges"),
        judge=f"{results}/judge/model.safetensors",
        rollouts=flow.per_rollout(ROLLOUTS),
    output:
        f"{results}/judgements/judgements.parquet",
    log:
        f"{results}/logs/judge_rollouts.log",
    benchmark:
        f"{results}/benchmarks/judge_rollouts.jsonl"
    conda:
        "../envs/base.yaml"
    threads: 1
    shell:
        "python -m workflow_src.judges.score --config {input.config} --judge {input.judge}"
        " --rollouts {input.rollouts} --out {output} 2>&1 | tee {log}"
