#!lua flags=allow-oom
-- include keys.lua
-- include fence_trainer.lua
-- ARGV[3]: lease in ms. An expired lease is not revived here: retake_job.lua looks who held the job in between.
redis.call('PEXPIRE', K.trainer, ARGV[3])
return {'ok'}
