from advmoe.reports.costs import profile_markdown


def test_markdown_table_has_every_backbone():
    head, rule, *rows = profile_markdown().splitlines()
    assert head.count("|") == rule.count("|") == 6
    assert len(rows) == 8 * 3
    assert "| cifar10, resnet18 | dense | 11.17 M | 0.555 |  |" in rows
    assert "| cifar10, resnet18 | MoE | 5.57 M | 0.152 | -72.7 % |" in rows
