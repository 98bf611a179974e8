"""The forms of captioned images that people have, a file for each kind.

A form is a module with `EXPECTED`, what it is called in an error, `reader(path)`, the function that reads what is
at `path` or None where that is something else, and that function, `read(rows, path, root, **options)`: it gathers
samples in `fastprob.data.rows.Rows`, rejects rows that can't be used, and returns the data set's name. root is the
directory of the images where the user named one; an option that it does not have is an error of the user's.
"""

from fastprob.data.formats import coco, flickr, folders, parquet, tables, tars

FORMATS = (coco, flickr, tables, tars, parquet, folders)
EXPECTED = "; ".join(each.EXPECTED for each in FORMATS)
