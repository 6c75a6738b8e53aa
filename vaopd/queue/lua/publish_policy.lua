#!lua
-- include keys.lua
-- include fence_trainer.lua
-- ARGV: 3 version, 4 PolicyVersion. What is published is the latest: versions beyond it, left by a trainer that was then
-- resumed from an older checkpoint, are withdrawn.
redis.call('HSET', K.policies, ARGV[3], ARGV[4])
redis.call('SET', K.policy, ARGV[3])
for _, version in ipairs(redis.call('HKEYS', K.policies)) do
  if tonumber(version) > tonumber(ARGV[3]) then redis.call('HDEL', K.policies, version) end
end
return {'ok'}
