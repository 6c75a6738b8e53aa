#!lua
-- include keys.lua
-- include fence_trainer.lua
-- Trades a group that can't be used for its request, though both were published before. ARGV: 3 the group's id, 4 dedupe
-- key of the group, 5 dedupe key of the request, 6 request. Refused as a whole when memory is full (no allow-oom). A group
-- that is gone was traded by this very call, whose reply was lost.
if redis.call('XACK', K.groups, 'trainer', ARGV[3]) == 1 then
  redis.call('XDEL', K.groups, ARGV[3])
  redis.call('HDEL', K.seen_groups, ARGV[4])
  if ARGV[4] == ARGV[5] or redis.call('HEXISTS', K.seen_requests, ARGV[5]) == 0 then
    local id = redis.call('XADD', K.requests, '*', 'key', ARGV[5], 'body', ARGV[6])
    redis.call('HSET', K.seen_requests, ARGV[5], id)
  end
end
return {'ok'}
