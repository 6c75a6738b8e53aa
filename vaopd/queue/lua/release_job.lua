#!lua flags=allow-oom
-- include keys.lua
-- include fence_trainer.lua
-- ARGV[3]: id of the last group that this trainer read. A clean stop is not a death: what it read and did not acknowledge
-- gets that delivery back, so that restarts alone never bring a group into the dead letters.
for _, pending in ipairs(redis.call('XPENDING', K.groups, 'trainer', '-', ARGV[3], 1000000, 'trainer')) do
  redis.call('XCLAIM', K.groups, 'trainer', 'trainer', 0, pending[1], 'RETRYCOUNT', math.max(pending[4] - 1, 0), 'JUSTID')
end
redis.call('DEL', K.trainer, K.last_trainer)
return {'ok'}
