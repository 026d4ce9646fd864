"""A batch: many rows through the queue with at most a window of jobs open. Decided here without I/O.

| file       | answers                                                                            |
|------------|------------------------------------------------------------------------------------|
| row.py     | is this line a row, and which job is it?                                           |
| answer.py  | what became of a row, and its line in the output?                                  |
| ledger.py  | was this custom_id there already? In 16 bytes a row                                |
| window.py  | which rows are open, and what has to be done about each?                           |
| course.py  | what to ask of Redis next, and what its replies mean; run by the clients           |
| source.py  | where rows come from when they are an iterable                                     |
"""
