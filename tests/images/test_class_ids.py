"""Class ids from names and tables alone, without an image: the rules of ImageFolder, and every line that is not like
the others."""

import numpy as np
import pytest

from vit_convert.core.errors import CalibrationError
from vit_convert.images.labels import class_root, labels_by_folder, labels_by_table, parse_table


def ids(files, folders=(), classes=None):
    found = labels_by_folder("d", files, folders, None if classes is None else classes.encode())
    if found is None:
        return None
    assert found[0].dtype == np.int64
    return found[0].tolist(), found[1]


def refusal(*arguments):
    with pytest.raises(CalibrationError) as error:
        ids(*arguments)
    assert error.value.fix
    return str(error.value)


def test_places_in_sorted_order():
    """By code point, as Python sorts and torchvision does: capitals first, 10 before 2."""
    assert ids(["b/1.png", "A/1.png", "a/x/2.png", "b/0.png", "c10/1.png", "c2/1.png"]) == ([2, 0, 1, 2, 3, 4], True)
    assert ids(["b/1.png"], ["b"]) == ([0], True)


def test_no_classes():
    assert ids([]) is ids(["1.png"]) is ids(["a/1.png", "2.png"], ["a"]) is ids(["2.png"], ["a"], "a\n") is None


def test_numbers_are_themselves():
    assert ids(["10/1.png", "2/1.png", "007/1.png"], ["10", "2", "007", "99"]) == ([10, 2, 7], False)
    assert ids(["0/1.png", "x/1.png"]) == ([0, 1], True)  # one that is none makes all of them names
    assert ids(["1" * 18 + "/1.png"]) == ([int("1" * 18)], False)
    assert ids(["1" * 19 + "/1.png"]) == ([0], True)  # which no int64 holds
    assert ids(["٣/1.png"]) == ([0], True)  # a digit elsewhere
    assert refusal(["1/1.png", "01/1.png"]) == "images d: folders 01, 1: two of them are the same number"
    assert refusal(["1/1.png"], ["1", "01"]) == "images d: folders 01, 1: two of them are the same number"


def test_a_number_that_is_not_its_place():
    """ImageFolder would call what lies in "0" class 1, which no name there says."""
    said = "images d: folder 0 is number 1 of 3 in sorted order, because -1 is no number"
    assert refusal(["-1/1.png", "0/1.png", "1/1.png"]) == said
    assert refusal(["0/1.png", "2/1.png", "x/1.png"]).startswith("images d: folder 2 is number 1 of 3 in sorted order")
    assert ids(["0/1.png", "1/1.png", "nine/1.png", "~/1.png"]) == ([0, 1, 2, 3], True)


def test_a_class_without_images():
    assert refusal(["ant/1.png", "cat/1.png"], ["ant", "bee", "cat"]).startswith(
        "images d: no image in class folder bee, so every"
    )
    many = [f"c{i}" for i in range(11)]
    text = refusal(["c0/1.png"], many)
    assert "c1, c10, c2, c3, c4, c5, c6, c7 and 2 more, so" in text and "c8" not in text
    assert "c1, c2, c3, c4, c5, c6, c7, c8, so" in refusal(["c0/1.png"], many[:9])


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val"),
        ("test", "Train"),
        ("training", "validation"),
        ("VALID", "dev"),
        ("testing", "train"),
        ("eval", "train"),
        ("evaluation", "val"),
    ],
)
def test_splits(names):
    assert "are splits of a data set, not classes" in refusal([f"{name}/a/1.png" for name in names])
    assert "are splits" in refusal([f"{names[0]}/1.png"], names)
    assert ids([f"{name}/1.png" for name in (*names, "zebra")], names)[1]  # a class may be called so
    assert ids([f"{names[0]}/1.png"]) == ([0], True)


@pytest.mark.parametrize("classes", ["dog\ncat\nant\n", "dog\r\ncat\r\nant", "\ufeffdog\n cat\t\nant\n\n \n"])
def test_a_list_of_classes(classes):
    assert ids(["cat/1.png", "ant/1.png"], ["ant", "cat"], classes) == ([1, 2], False)
    assert ids(["ant/1.png"], ["ant", "cat"], classes) == ([2], False)  # an empty one takes no other's number
    assert "d/classes.txt: has no line 'bee', which is a folder" in refusal(["bee/1.png", "cat/1.png"], [], classes)
    assert "has no line 'bee'" in refusal(["cat/1.png"], ["bee"], classes)
    assert "Did you mean ant" in refusal(["anti/1.png"], [], classes)


def test_a_list_names_numbers_too():
    assert ids(["10/1.png", "2/1.png"], [], "2\n10\n") == ([1, 0], False)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ("ant\n\nbee\n", "line 2 is empty"),
        ("\nant\n", "line 1 is empty"),
        ("ant\nbee\nant\n", "line 3 is 'ant' for a second time"),
        ("ant\nant", "line 2 is 'ant' for a second time"),
        ("", "has no line 'ant', which is a folder"),
    ],
)
def test_lists_with_mistakes(classes, said):
    assert refusal(["ant/1.png"], [], classes).startswith(f"d/classes.txt: {said}")


def test_a_list_that_is_no_text():
    with pytest.raises(CalibrationError, match=r"d/classes\.txt: not text .*utf-8") as error:
        labels_by_folder("d", ["ant/1.png"], [], "ant\n".encode("utf-16"))
    assert "UTF-8" in error.value.fix


# --- tables -----------------------------------------------------------------------------------------------------------


def parsed(text, separator=","):
    paths, labels = parse_table("t", text.encode(), separator)
    assert labels is None or labels.dtype == np.int64
    return paths, None if labels is None else labels.tolist()


@pytest.mark.parametrize(
    ("text", "separator", "paths", "labels"),
    [
        ("a.png,1\nb.png,2\n", ",", ["a.png", "b.png"], [1, 2]),
        ("\ufeffa.png , 1 \r\n\r\n b.png,002", ",", ["a.png", "b.png"], [1, 2]),
        ('"a, of two.png",0\n', ",", ["a, of two.png"], [0]),
        ("a.png\nb.png\n", ",", ["a.png", "b.png"], None),
        ("a.png\t1\nb c.png\t2\n", "\t", ["a.png", "b c.png"], [1, 2]),
        ("path,label\na.png,1\n", ",", ["a.png"], [1]),
        ("image name,class\na.png,1\n", ",", ["a.png"], [1]),
        ("a,b\nc,1\n", ",", ["c"], [1]),
        ("image\na.png\n", ",", ["image", "a.png"], None),  # without a number nothing tells a header
        ("a.png,1" + "0" * 17 + "\n", ",", ["a.png"], [10**17]),
        ("a.png 1\nb c.png\t2\n d.png, 3\n", "", ["a.png", "b c.png", "d.png"], [1, 2, 3]),
        ("a.png ,\t1\n", "", ["a.png"], [1]),
        ("a 1.png\nb2\n", "", ["a 1.png", "b2"], None),  # digits of the name
        ("a.png\n\n  \n", "", ["a.png"], None),
        ("path label\n", "", ["path label"], None),
        ("12\n34\n", "", ["12", "34"], None),
        ("", "", [], None),
        ("", ",", [], None),
        (",,\n", ",", None, None),
    ],
)
def test_tables(text, separator, paths, labels):
    if paths is None:
        with pytest.raises(CalibrationError):
            parsed(text, separator)
    else:
        assert parsed(text, separator) == (paths, labels)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a.png,1\nb.png\n", "b.png"),
        ("a.png\nb.png,1\n", "b.png,1"),
        ("a.png,1\nb.png,cat\n", "b.png,cat"),
        ("a.png,1\nb.png,-1\n", "b.png,-1"),
        ("a.png,1\nb.png,1.0\n", "b.png,1.0"),
        ("a.png,1,2\n", "a.png,1,2"),
        ("a.png,1\nb.png,9999999999999999999\n", "b.png,9999999999999999999"),
        ("a.png,cat\nb.png,1\n", "a.png,cat"),  # no header: an image would be lost
        ("a.png,-1\nb.png,1\n", "a.png,-1"),
        ("path,-1\nb.png,1\n", "path,-1"),
        ("path,nan\nb.png,1\n", "path,nan"),
        ("path,\nb.png,1\n", "path,"),
        ("path,label\nb.png,cat\n", "path,label"),
        ("path,label\n", "path,label"),
        ("path,label,x\na.png,1,2\n", "path,label,x"),
        ("path\na.png,1\n", "a.png,1"),
    ],
)
def test_lines_that_are_not_like_the_others(text, line):
    with pytest.raises(CalibrationError) as error:
        parsed(text)
    assert str(error.value) == f"t: line {line!r} is not like the others"
    assert "a class id >= 0" in error.value.fix


def test_a_line_is_shown_in_part():
    with pytest.raises(CalibrationError) as error:
        parsed("a.png,1\n" + "b" * 500 + "\n")
    assert str(error.value) == f"t: line {'b' * 200!r} is not like the others"


def test_bytes_that_are_no_table():
    for content in ("ä,1\n".encode("utf-16"), b"\xff\xfe\n", b"\x80"):
        with pytest.raises(CalibrationError, match=r"t: not a table of text") as error:
            parse_table("t", content, ",")
        assert error.value.fix == "Save it as UTF-8."
    with pytest.raises(CalibrationError, match="t: not a table of text"):
        parse_table("t", b'a,"' + b"x" * (1 << 18) + b'"\n', ",")  # a cell of more than csv takes


def test_labels_of_files():
    table = b"name,label\nb.png,5\nx/a.png,3\nmore.png,9\nb.png,5\n"
    found = labels_by_table("t", ["x/a.png", "b.png"], table)
    assert (found.tolist(), found.dtype) == ([3, 5], np.int64)
    assert labels_by_table("t", [], table).tolist() == []


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (b"a.png\n", "t: no labels in it"),
        (b"", "t: no labels in it"),
        (b"a.png,1\na.png,2\n", "t: labels a.png twice, 1 and 2"),
        (b"b.png,1\n", "t: no label for a.png"),
        (b"x/a.png,1\n", "t: no label for a.png"),
    ],
)
def test_tables_without_the_one_label(table, said):
    with pytest.raises(CalibrationError) as error:
        labels_by_table("t", ["a.png"], table)
    assert str(error.value) == said and error.value.fix


# --- where the classes begin ------------------------------------------------------------------------------------------


def root(files, *others):
    folders = {}
    for name in [*files, *others]:
        parts = name.split("/")
        for depth in range(len(parts) - 1):
            inside = folders.setdefault("/".join(parts[:depth]), [])
            if parts[depth] not in inside:
                inside.append(parts[depth])
    return class_root(files, folders, {name for name in others if not name.endswith("/")})


@pytest.mark.parametrize(
    ("files", "others", "prefix"),
    [
        (["a/1.png", "b/1.png"], [], ""),
        (["val/a/1.png", "val/b/1.png"], [], "val/"),
        (["data/val/a/1.png", "data/val/b/1.png"], [], "data/val/"),
        (["val/a/1.png"], [], "val/"),  # val/ is around a, which holds images
        (["a/1.png"], [], ""),  # it is the class
        (["1.png"], [], ""),
        ([], [], ""),
        (["val/a/1.png", "1.png"], [], ""),  # an image beside it
        (["val/a/1.png", "val/2.png"], [], "val/"),
        (["val/a/1.png"], ["other/"], ""),
        (["val/a/1.png"], ["labels.csv"], ""),  # whose names begin here
        (["val/1.png"], ["val/labels.csv"], "val/"),
        (["x/val/1.png", "x/val/a/2.png"], ["x/val/labels.csv"], "x/val/"),
        (["x/y/z/a/1.png", "x/y/z/b/1.png"], ["x/y/labels.csv"], "x/y/"),
        (["val/a/1.png"], ["notes.txt", "val/classes.txt"], "val/"),
    ],
)
def test_folders_around_the_classes(files, others, prefix):
    assert root(files, *others) == prefix
