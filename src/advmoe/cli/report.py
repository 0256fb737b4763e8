"""`advmoe report`."""

import json
from dataclasses import asdict

from advmoe.cli.arguments.report import ReportArguments
from advmoe.errors import printable
from advmoe.evaluation.record import record_schema
from advmoe.reports.collect import collect
from advmoe.reports.write import FORMS, write_report
from advmoe.wording import number_of


def run(arguments: ReportArguments) -> None:
    if arguments.schema:
        print(json.dumps(record_schema(), indent=1))
        return
    records = collect(arguments.runs)
    written, claims, statements = write_report(records, arguments.out)
    if arguments.json:
        lines = [str(statement) for statement in statements]
        content = {"records": len(records), "verdict": lines, "claims": [asdict(claim) for claim in claims], "files": written}
        print(json.dumps(content))
        return
    print(
        *(printable(str(statement)) for statement in statements),
        "",
        *(f"{claim.verdict:12} {claim.text}" for claim in claims),
        "",
        sep="\n",
    )
    files = f"{arguments.out}: report.html, tables/ ({', '.join(FORMS)}), figures/ (png, pdf)"
    print(f"Written from {number_of(len(records), 'Record')} to {files}")
