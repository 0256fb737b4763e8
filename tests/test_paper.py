from collections import Counter

from advmoe.paper import printed_cells


def find(table, model, scale, method):
    (cell,) = [c for c in printed_cells() if (c.table, c.model, c.model_scale, c.method) == (table, model, scale, method)]
    return cell


def test_every_printed_cell_occurs_once():
    counts = Counter((cell.table, cell.model, cell.model_scale, cell.method) for cell in printed_cells())
    assert set(counts.values()) == {1}
    assert Counter(cell.table for cell in printed_cells()) == {"A1": 10, "A2": 26}
    assert {(cell.table, cell.attack_steps) for cell in printed_cells()} == {("A1", 10), ("A2", 2)}
    assert {cell.dataset for cell in printed_cells()} == {"cifar10"}


def test_a_row_of_each_table_as_printed():
    cell = find("A1", "wrn28_10", 0.5, "advmoe")
    assert (cell.ra, cell.ra_std, cell.ra_aa, cell.ra_aa_std, cell.sa, cell.sa_std) == (56.13, 0.11, 46.73, 0.08, 82.19, 0.14)
    assert (cell.gflops, cell.reduction) == (1.75, 67)
    cell = find("A2", "resnet18", 0.2, "at_small_dense")
    assert (cell.ra, cell.ra_std, cell.ra_aa, cell.ra_aa_std, cell.sa, cell.sa_std) == (43.83, 0.11, None, None, 78.28, 0.14)
    assert (cell.gflops, cell.reduction) == (0.13, 76)


def test_dense_networks_have_no_reduction():
    assert {cell.method for cell in printed_cells() if cell.reduction is None} == {"at_dense"}


def test_both_tables_print_the_same_costs():
    columns = [
        {(c.model, c.model_scale, c.method): (c.gflops, c.reduction) for c in printed_cells() if c.table == table}
        for table in ("A1", "A2")
    ]
    assert columns[0].items() <= columns[1].items()


def test_recipe_names_omit_defaults():
    assert find("A1", "resnet18", 1.0, "at_dense").recipe == "cifar10-resnet18-at_dense-steps10"
    assert find("A2", "wrn28_10", 0.8, "at_sparse").recipe == "cifar10-wrn28_10-at_sparse-r0.8"
    assert find("A2", "wrn28_10", 0.5, "advmoe").recipe == "cifar10-wrn28_10-advmoe"
