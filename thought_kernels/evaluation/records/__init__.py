"""Results on disk: whole files, a journal that a stopped run goes on from, digests of what they were made from."""
