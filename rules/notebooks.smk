"""
Notebooks, executed from finished tables only.

needs   results/tables/*.csv, or the tables of a report on published numbers
makes   results/notebooks/<name>.ipynb (executed) and .html; results/published/<name>/agreement.html
how     papermill through the shell; notebooks in git hold no output
"""


rule published:
    input:
        expand(f"{results}/published/{{name}}/agreement.html", name=PUBLISHED),
        rules.draw_experiments.output,


rule render_published:
    input:
        notebook=f"{workflow.basedir}/notebooks/agreement.ipynb",
        ranking=f"{results}/published/{{published}}/policy_ranking.csv",
        per_task=f"{results}/published/{{published}}/per_task.csv",
        agreement=f"{results}/published/{{published}}/agreement.csv",
        comparisons=f"{results}/published/{{published}}/comparisons.csv",
        sources=flow.sources(*DRAWING),
    output:
        notebook=f"{results}/published/{{published}}/agreement.ipynb",
        html=report(
            f"{results}/published/{{published}}/agreement.html",
            caption="../config/report/published.rst",
            category="Published numbers",
            labels={"result": "agreement of {published}", "form": "page"},
        ),
    log:
        f"{results}/logs/render_published/{{published}}.log",
    conda:
        "../envs/base.yaml"
    params:
        tables=f"{results}/published/{{published}}",
    shell:
        "(papermill {input.notebook} {output.notebook} -k python3 -p tables $(realpath {params.tables})"
        " && jupyter nbconvert --to html {output.notebook}) > {log} 2>&1"


rule render_notebook:
    input:
        notebook=f"{workflow.basedir}/notebooks/{{notebook}}.ipynb",
        ranking=f"{results}/tables/policy_ranking.csv",
        per_task=f"{results}/tables/per_task.csv",
        agreement=f"{results}/tables/agreement.csv",
        judge=f"{results}/tables/judge.csv",
        comparisons=f"{results}/tables/comparisons.csv",
        prediction_powered=f"{results}/tables/prediction_powered.csv",
        variance=f"{results}/tables/variance.csv",
        sources=flow.sources(*DRAWING),
    output:
        notebook=f"{results}/notebooks/{{notebook}}.ipynb",
        html=report(
            f"{results}/notebooks/{{notebook}}.html",
            caption="../config/report/notebook.rst",
            category="Notebooks",
            labels={"result": "{notebook}", "form": "page"},
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
