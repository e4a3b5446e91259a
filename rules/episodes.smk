"""
Recorded robot data. Data sets of others (episodes.stores) are read where they are, those in buckets fetched (buckets.smk).

needs   nothing but the configuration (sections lab, episodes)
makes   results/episodes/<dataset>/<split>/episodes.parquet, written last, beside one mp4 and one npz per episode
how     the lab's expert and its disturbed relatives act in the simulator; an interrupted recording continues
"""


rule record_episodes:
    input:
        config=flow.recording,
    output:
        f"{flow.episodes}/{{split}}/episodes.parquet",
    log:
        f"{results}/logs/record_episodes/{flow.config.episodes.dataset}/{{split}}.log",
    benchmark:
        f"{results}/benchmarks/record_episodes/{flow.config.episodes.dataset}/{{split}}.jsonl"
    # All splits before any training: the tokenizer, for which everything waits, needs two of them.
    priority: 20
    conda:
        "../envs/base.yaml"
    threads: flow.config.lab.workers
    resources:
        mem_mb=recording_memory(flow.config.lab.workers),
        runtime=growing(240, DAY),
    shell:
        "python -m workflow_src.episodes.record --config {input.config} --split {wildcards.split}"
        " --out {output} 2>&1 | tee {log}"
