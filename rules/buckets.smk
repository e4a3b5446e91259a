"""
Buckets, by Snakemake's storage plugins: data sets that lie in one, and a copy of the results in one.

needs   the plugin for s3:// or gs://, and credentials where it looks for them
makes   results/episodes/<dataset>/<split>/ of data sets that episodes.stores names by address, episodes.parquet last;
        with the target `publish`: <publish.to>/<part>/ for each of publish.parts, which are folders of the results
how     a data set is fetched once: what changes in its bucket later reruns nothing. Parts are replaced, as wholes, when what
        the default target makes has changed; `--forcerun publish_part` also sends what was made on request since
"""

if flow.in_buckets:

    rule fetch_store:
        input:
            lambda wildcards: ancient(storage(f"{flow.in_buckets[wildcards.dataset]}/{wildcards.split}")),
        output:
            f"{results}/episodes/{{dataset}}/{{split}}/episodes.parquet",
        log:
            f"{results}/logs/fetch_store/{{dataset}}/{{split}}.log",
        wildcard_constraints:
            dataset=any_of(flow.in_buckets),
            split="train|validation",
        # What a killed run had fetched in part, Snakemake takes for the whole; found damaged, it is fetched by the retry.
        retries: 1
        localrule: True
        conda:
            "../envs/base.yaml"
        shell:
            "python -m workflow_src.buckets.fetch_store {input:q} --out {output} 2>&1 | tee {log}"


if to := flow.config.publish.to.rstrip("/"):

    rule publish:
        input:
            [storage(f"{to}/{part}", retrieve=False) for part in flow.config.publish.parts],
            storage(f"{to}/run_config.yaml", retrieve=False),

    # The plugin removes a part before it replaces it, and with it the bucket, if that is then empty. This file stays.
    rule found_publication:
        output:
            storage(f"{to}/README.txt"),
        log:
            f"{results}/logs/publish/README.log",
        localrule: True
        shell:
            "echo 'Results of Rehearsal. Fetch this folder whole, then open tables/index.html and gallery/index.html.'"
            " > {output:q} 2> {log}"

    rule publish_configuration:
        input:
            storage(f"{to}/README.txt", retrieve=False),
            config=f"{results}/run_config.yaml",
        output:
            storage(f"{to}/run_config.yaml"),
        log:
            f"{results}/logs/publish/run_config.log",
        localrule: True
        shell:
            "cp {input.config} {output:q} 2> {log}"

    rule publish_part:
        input:
            storage(f"{to}/README.txt", retrieve=False),
            rules.all.input,
        output:
            storage(directory(f"{to}/{{part}}")),
        log:
            f"{results}/logs/publish/{{part}}.log",
        wildcard_constraints:
            part=any_of(flow.config.publish.parts),
        localrule: True
        conda:
            "../envs/base.yaml"
        shell:
            "python -m workflow_src.buckets.publish {results}/{wildcards.part} --out {output:q} 2>&1 | tee {log}"

else:

    rule publish:
        input:
            nothing_to_publish,
