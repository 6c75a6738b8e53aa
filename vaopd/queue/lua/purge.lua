#!lua flags=allow-oom
-- include keys.lua
-- include fence_trainer.lua
-- Every key of the job, the trainer's lease and the epoch included.
for _, key in ipairs(KEYS) do redis.call('DEL', key) end
return {'ok'}
