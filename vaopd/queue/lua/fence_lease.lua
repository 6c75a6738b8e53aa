-- A lease is (worker, delivery count): whoever takes the entry over raises the count, so a late commit can be told apart
-- even when it comes from a worker of the same name. pcall: after a Redis that came back empty there is no group at all.
local function owns(id, worker, deliveries)
  local pending = redis.pcall('XPENDING', K.requests, 'rollout', id, id, 1)
  if pending.err or not pending[1] then return false end
  return pending[1][2] == worker and pending[1][4] == tonumber(deliveries)
end
