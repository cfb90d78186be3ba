"""From the posts of dumps to the four sets of the stage prepare: pure functions of files.

May import the rest of ``data``. Read ``shards`` first: what is done with a part and with a bucket.
"""
