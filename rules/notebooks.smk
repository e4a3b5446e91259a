"""
Notebooks, executed from finished tables only.

needs   results/tables/*.csv
makes   results/notebooks/<name>.ipynb (executed) and .html
how     papermill through the shell; notebooks in git hold no output
"""


rule render_notebook:
    input:
        notebook=f"{workflow.basedir}/notebooks/{{notebook}}.ipynb",
        ranking=f"{results}/tables/policy_ranking.csv",
        per_task=f"{results}/tables/per_task.csv",
        agreement=f"{results}/tables/agreement.csv",
        judge=f"{results}/tables/judge.csv",
        sources=flow.sources("figures.py", "labels.py"),
    output:
        notebook=f"{results}/notebooks/{{notebook}}.ipynb",
        html=report(
            f"{results}/notebooks/{{notebook}}.html",
            caption="../config/report/notebook.rst",
            category="Notebooks",
        ),
    log:
        f"{results}/logs/render_notebook/{{notebook}}.log",
    benchmark:
        f"{results}/benchmarks/render_notebook/{{notebook}}.jsonl"
    conda:
        "../envs/base.yaml"
    params:
        tables=f"{results}/tables",
    shell:
        "(papermill {input.notebook} {output.notebook} -k python3 -p tables $(realpath {params.tables})"
        " && jupyter nbconvert --to html {output.notebook}) > {log} 2>&1"
